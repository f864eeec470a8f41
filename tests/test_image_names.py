"""Names of images: by id, by file, and which names are of the same image."""

import pytest

from blip_jax.evaluators.scores import image_names
from blip_jax.evaluators.scores.image_names import Image


@pytest.mark.parametrize(
  "path, name",
  [
    ("images/dog.jpg", "dog.jpg"),
    ("img_00042.jpg", "img_00042.jpg"),
    ("0.png", 0),
    ("flickr30k-images/1000092795.jpg", 1000092795),
    ("val2014/COCO_val2014_000000391895.jpg", 391895),
    ("12", 12),
    ("22.05.jpg", "22.05.jpg"),
    (f"{'1' * 30}.jpg", f"{'1' * 30}.jpg"),
    ("val.json:3", "val.json:3"),
    ("00000.tar:000012", "00000.tar:000012"),
    ("val.tar:000000391895", "val.tar:000000391895"),
  ],
)
def test_files_without_an_id(path, name):
  assert image_names.of_images([Image(None, path)]) == [name]


def test_an_id_is_the_name():
  images = [
    Image(7, "a.jpg"),
    Image("8", "b.jpg"),
    Image("x1", "c.jpg"),
    Image(None, "9.jpg"),
  ]
  assert image_names.of_images(images) == [7, 8, "x1", 9]


def test_different_images_have_different_names():
  """As much of the path as is needed, only where it is needed."""
  paths = ["a/1.jpg", "b/1.jpg", "b/1.png", "c/a/dog.jpg", "d/a/dog.jpg", "x"]
  images = [Image(None, path) for path in paths]
  assert image_names.of_images(images) == [*paths[:2], "1.png", *paths[3:]]
  # An id is never changed.
  images = [Image(1, "a.jpg"), Image(None, "b/1.jpg")]
  assert image_names.of_images(images) == [1, "1.jpg"]


def by_path(path):
  return Image(None, path)


# A name in COCO's format of results, or the path.
@pytest.mark.parametrize(
  "reference, result, fits",
  [
    ("dog.jpg", by_path("dog.jpg"), True),
    ("dog.jpg", Image("dog.jpg"), True),
    ("./p/../dog.jpg", by_path("dog.jpg"), True),
    ("a/dog.jpg", Image("dog.jpg"), True),
    ("dog.jpg", by_path("a/dog.jpg"), True),
    ("a/dog.jpg", by_path("b/dog.jpg"), True),
    ("a/dog.jpg", Image("b/dog.jpg"), False),
    ("hotdog.jpg", by_path("dog.jpg"), False),
    ("dog.png", by_path("dog.jpg"), False),
    ("img_00042.jpg", Image(42), True),
    ("42", Image("img_00042.jpg"), False),
    ("f/0007.jpg", Image(7), True),
    ("f/7.jpg", Image("7"), True),
    ("f/7.jpg", by_path("g/7.jpg"), True),
    ("val.json:3", Image(3), False),
    ("val.json:3", by_path("val.json:3"), True),
  ],
)
def test_paths_that_fit(reference, result, fits):
  references = [by_path("other"), by_path(reference)]
  assert image_names.matched([result], references) == [1 if fits else None]


@pytest.mark.parametrize(
  "reference, result, fits",
  [
    (7, 7, True),
    ("007", 7, True),
    (7, "000000000007", True),
    ("x1", "x1", True),
    (7, 8, False),
    (42, "img_42.jpg", False),
  ],
)
def test_ids_that_fit(reference, result, fits):
  references = [Image(1), Image(reference)]
  assert image_names.matched([Image(result)], references) == [
    1 if fits else None
  ]


def test_a_path_that_fits_two_images_is_not_used():
  references = [by_path("a/1.jpg"), by_path("b/1.jpg")]
  assert image_names.matched([by_path("1.jpg")], references) == [None]
  results = [by_path("a/1x.jpg"), by_path("b/1x.jpg")]
  assert image_names.matched(results, [by_path("1x.jpg")]) == [None, None]


def test_the_longest_common_end_of_two_paths_wins():
  names = ["dog.jpg", "b/dog.jpg"]
  references = [by_path(name) for name in names]
  assert image_names.matched(references, references) == [0, 1]
  assert image_names.matched(references[:1], references) == [0]
  assert image_names.matched(references, references[:1]) == [0, None]
  results = [by_path(f"root/{name}") for name in names]
  assert image_names.matched(results, references) == [0, 1]


# Image n is n.png, and has the id n + 1.
WITH_IDS = [Image(n + 1, f"{n}.png") for n in range(6)]
WITHOUT_IDS = [by_path(image.path) for image in WITH_IDS]


@pytest.mark.parametrize("references", [WITH_IDS, WITHOUT_IDS])
@pytest.mark.parametrize(
  "result",
  [
    lambda n: Image(None, f"img/{n}.png"),
    lambda n: Image(n + 1, f"img/{n}.png"),
    lambda n: Image(n, f"img/{n}.png"),  # as a run names it
  ],
)
def test_the_number_of_a_file_is_no_id(references, result):
  """The results are of a part of the images, of which each number is an id."""
  results = [result(n) for n in (1, 2, 4)]
  assert image_names.matched(results, references) == [1, 2, 4]


def test_a_number_that_may_be_id_or_file_is_refused():
  results = [Image(n) for n in (1, 2, 4)]
  assert image_names.matched(results, WITHOUT_IDS) == [1, 2, 4]
  assert image_names.matched(results, [Image(n) for n in range(6)]) == [1, 2, 4]
  with pytest.raises(ValueError, match=r"image_id 1 .*0.png.*3 of 3.*--by ima"):
    image_names.matched(results, WITH_IDS)
  assert image_names.matched(results, WITH_IDS, "image_id") == [0, 1, 3]
  assert image_names.matched(results, WITH_IDS, "path") == [1, 2, 4]


@pytest.mark.parametrize("numbers", [range(6), [0, 2]])
def test_what_fits_all_results_is_meant(numbers):
  """No image has the id 0."""
  results = [Image(n) for n in numbers]
  assert image_names.matched(results, WITH_IDS) == [*numbers]
  results = [Image(n + 1) for n in range(6)]  # there is no 6.png
  assert image_names.matched(results, WITH_IDS) == [*range(6)]


def test_an_image_without_an_id_has_its_path_among_images_with_ids():
  references = [*WITH_IDS[:3], by_path("a/dog.png")]
  results = [Image(1), Image("dog.png"), Image(3)]
  assert image_names.matched(results, references) == [0, 3, 2]
