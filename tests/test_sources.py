"""What all sources share: ids and URLs."""

import numpy as np
import pytest

from blip_jax.data import sources


@pytest.mark.parametrize(
  "name, number",
  [
    ("COCO_val2014_000000391895.jpg", 391895),
    ("000000391895.jpg", 391895),
    ("/data/val2014/COCO_val2014_000000391895.JPG", 391895),
    ("val/0.tar:000000391895", 391895),
    ("391895.jpg", None),
    ("1000268201_693b08cb0e.jpg", None),
    ("IMG_202403041200.jpg", None),
    ("0000000391895.jpg", None),
    ("000000391895/a.jpg", None),
  ],
)
def test_coco_file_names_contain_the_image_id(name, number):
  assert sources.coco_image_id(name) == number


def test_the_annotation_takes_precedence_over_the_file_name():
  record = {"image": "i/COCO_val2014_000000000007.jpg", "id": "val.json:3"}
  assert sources.image_id(record) == 7
  assert sources.image_id({**record, "image_id": "x"}) == "x"
  record = {"image": b"jpeg", "id": "0.tar:000000000009"}
  assert sources.image_id(record) == 9
  assert sources.image_id({"image": b"jpeg", "id": "train.json:3"}) is None


# As `wget --force-directories` names files.
@pytest.mark.parametrize(
  "url, path",
  [
    ("http://h:81/d%20e/a%20b.jpg?x=1&y=%2F2", "h:81/d e/a b.jpg?x=1&y=%2F2"),
    ("https://a.org/x/", "a.org/x/index.html"),
    ("https://a.org", "a.org/index.html"),
  ],
)
def test_a_url_has_a_path_below_the_image_root(url, path):
  assert sources.path_of_url(url) == path


@pytest.mark.parametrize(
  "url", ["https://a.org/../../etc/passwd", "https://a.org/%2e%2e/x", "http:/x"]
)
def test_a_url_cannot_leave_the_image_root(url):
  with pytest.raises(ValueError, match="no file"):
    sources.path_of_url(url)


def test_captions_of_an_image_share_a_number():
  """Computed from the annotation's id, the path or the content."""
  number = sources.image_number
  pixels = np.zeros((2, 2, 3), np.uint8)
  images = (
    [{"image": "a.jpg", "image_id": "7"}, {"image": "b.jpg", "image_id": 7}],
    [{"image": "a.jpg"}, {"image": "a.jpg", "id": "other"}],
    [{"image": b"encoded"}, {"image": b"encoded"}],
    [{"image": pixels}, {"image": pixels.copy()}],
    [{"image": "c.jpg"}, {"image": "c.jpg"}],
  )
  numbers = [{number(record) for record in same} for same in images]
  assert [len(same) for same in numbers] == [1] * len(images)
  assert len(set.union(*numbers)) == len(images)
  assert all(0 <= n < 2**31 for n in set.union(*numbers))


def test_an_image_is_the_same_in_any_row_and_spelling():
  key = sources.image_key
  path = {"image": "i/a.jpg", "id": "x:0"}
  assert key(path) == key({"image": "i//./a.jpg", "id": "x:1"})
  assert key(path) != key({"image": "i/b.jpg", "id": "x:0"})
  assert key(path | {"image_id": 3}) == key({"image": b"jpeg", "image_id": "3"})
  assert key(path | {"image_id": 3}) != key(path | {"image_id": 4})
  assert key({"image": "3"}) != key({"image": "i/a.jpg", "image_id": 3})
  square = np.zeros((2, 2), np.uint8)
  keys = [key({"image": square.reshape(shape)}) for shape in ((2, 2), (1, 4))]
  assert keys[0] == key({"image": square.copy()}) != keys[1]
  assert len({key(path), *keys}) == 3  # hashable


@pytest.mark.parametrize("name", ["b\udce9b\udce9.jpg", "a\ud800.jpg"])
def test_an_image_whose_name_is_no_utf8_has_a_number(name):
  assert sources.image_number({"image": name}) >= 0
  assert sources.image_number({"image": b"", "image_id": name}) >= 0


def test_selected_and_noted_rows_are_the_records_of_the_source():
  source = [{"id": f"x:{row}", "question": "why?"} for row in range(4)]
  rows = sources.Rows(source, np.array([3, 1]))
  noted = sources.Noted(rows, lambda index, record: (index, record["id"]))
  assert len(noted) == 2
  assert [noted[1], noted[0]] == [source[1], source[3]]
  assert noted.notes == {1: (1, "x:1"), 0: (0, "x:3")}
