"""Names of images: by id, by file, and which names are of the same image."""

import pytest

from blip_jax.evaluators.scores import image_names


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
  assert image_names.of_images([(None, path)]) == [name]


def test_an_id_is_the_name():
  images = [(7, "a.jpg"), ("8", "b.jpg"), ("x1", "c.jpg"), (None, "9.jpg")]
  assert image_names.of_images(images) == [7, 8, "x1", 9]


def test_different_images_have_different_names():
  """As much of the path as is needed, only where it is needed."""
  paths = ["a/1.jpg", "b/1.jpg", "b/1.png", "c/a/dog.jpg", "d/a/dog.jpg", "x"]
  images = [(None, path) for path in paths]
  assert image_names.of_images(images) == [*paths[:2], "1.png", *paths[3:]]
  # An id is never changed.
  images = [(1, "a.jpg"), (None, "b/1.jpg")]
  assert image_names.of_images(images) == [1, "1.jpg"]


@pytest.mark.parametrize(
  "reference, result, fits",
  [
    ("dog.jpg", "dog.jpg", True),
    ("a/dog.jpg", "dog.jpg", True),
    ("dog.jpg", "a/dog.jpg", True),
    ("a/dog.jpg", "b/dog.jpg", False),
    ("hotdog.jpg", "dog.jpg", False),
    ("img_00042.jpg", 42, True),
    (42, "img_00042.jpg", False),
    (391895, "val2014/COCO_val2014_000000391895.jpg", True),
    ("val.json:3", 3, False),
    (3, "val.json:3", False),
  ],
)
def test_names_that_fit(reference, result, fits):
  found = image_names.renamed({reference: "x", "other": "y"}, [result])
  assert found == {result if fits else reference: "x", "other": "y"}


def test_a_name_that_fits_two_images_is_not_used():
  references = {"a/1.jpg": "x", "b/1.jpg": "y"}
  assert image_names.renamed(references, ["1.jpg"]) == references
  references = {"1x.jpg": "x"}
  assert image_names.renamed(references, ["a/1x.jpg", "b/1x.jpg"]) == references


def test_an_equal_name_is_better_than_a_fitting_one():
  references = {"dog.jpg": "x", "b/dog.jpg": "y"}
  names = ["dog.jpg", "b/dog.jpg"]
  assert image_names.renamed(references, names) == references
  assert image_names.renamed(references, names[:1]) == references
