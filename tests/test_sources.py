"""What all sources share: ids and URLs."""

import errno

import numpy as np
import pytest

from blip_jax.data import annotations, sources


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
  """Computed from the path, or the annotation's id, or the content."""
  number = sources.image_number
  pixels = np.zeros((2, 2, 3), np.uint8)
  images = (
    [{"image": "a.jpg", "image_id": "7"}, {"image": "a.jpg"}],
    [{"image": "b.jpg"}, {"image": "./b.jpg", "id": "other"}],
    [{"image": b"one", "image_id": 7}, {"image": b"two", "image_id": "7"}],
    [{"image": b"encoded"}, {"image": b"encoded"}],
    [{"image": pixels}, {"image": pixels.copy()}],
    [{"image": b"one", "image_id": 7, "source_number": 1}],
  )
  numbers = [{number(record) for record in same} for same in images]
  assert [len(same) for same in numbers] == [1] * len(images)
  assert len(set.union(*numbers)) == len(images)
  assert all(0 <= n < 2**31 for n in set.union(*numbers))


def test_an_image_is_the_same_in_any_row_and_spelling():
  def same(*records):
    images = sources.joined(map(sources.image_keys, records))
    return len(images) == 1

  path = {"image": "i/a.jpg", "id": "x:0"}
  assert same(path, {"image": "i//./a.jpg", "id": "x:1"})
  assert not same(path, {"image": "i/b.jpg", "id": "x:0"})
  assert same(path | {"image_id": 3}, {"image": b"jpeg", "image_id": "3"})
  assert same(path | {"image_id": 3}, path)
  assert not same({"image": "3"}, {"image": "i/a.jpg", "image_id": 3})
  square = np.zeros((2, 2), np.uint8)
  assert same({"image": square}, {"image": square.copy()})
  assert not same({"image": square}, {"image": square.reshape(1, 4)})


def test_rows_are_joined_through_other_rows():
  """In the order of the first rows."""
  rows = [["a"], ["b"], ["c", "x"], ["b"], ["y", "a"], ["x", "y"], []]
  assert sources.joined(rows) == [[0, 2, 4, 5], [1, 3], [6]]


def test_captions_that_are_no_texts_are_named():
  record = {"id": "x:3", "caption": ["a dog", "", "a cat", "...", b"\xff"]}
  usable, bad = sources.usable_captions(record)
  assert usable == ["a dog", "a cat"]
  assert [(each.id, each.reason) for each in bad] == [
    ("x:3#1", "empty_caption"),
    ("x:3#3", "empty_caption"),
    ("x:3#4", "invalid_utf8"),
  ]
  usable, (bad,) = sources.usable_captions({"id": "x:3", "caption": " "})
  assert (usable, bad.id) == ([], "x:3")


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


class Rows(sources.Source):
  """Rows that raise what they are."""

  def __init__(self, rows):
    self.rows = rows

  def __len__(self):
    return len(self.rows)

  def _id(self, index):
    return f"rows:{index}"

  def _record(self, index, id):
    if isinstance(self.rows[index], BaseException):
      raise self.rows[index]
    return {"image": self.rows[index], "id": id}


@pytest.mark.parametrize(
  "error",
  [
    IndexError("x"), KeyError("x"), MemoryError(), RecursionError(),
    OverflowError("x"), OSError(5, "Input/output error"), UnicodeError("x"),
    TypeError("x"), AttributeError("x"), StopIteration(), EOFError(),
  ],
)  # fmt: skip
def test_whatever_a_row_raises_costs_that_row(error):
  source = Rows(["a", error, "b"])
  assert [source[row]["image"] for row in (0, 2)] == ["a", "b"]
  with pytest.raises(sources.BadRow) as bad:
    source[1]
  assert (bad.value.id, bad.value.reason) == ("rows:1", "error")
  assert bad.value.detail.startswith(f"{type(error).__name__}: ")
  assert sources.row_id(source, 1) == "rows:1"
  assert sources.row_id(source, 3) is None


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EMFILE, "Too many open files"),
    KeyboardInterrupt(),
    SystemExit(1),
  ],
)
def test_what_would_hit_every_row_is_raised(error):
  with pytest.raises(type(error)) as raised:
    Rows([error])[0]
  assert raised.value is error


def test_an_annotation_file_that_is_gone_costs_rows_not_the_job(tmp_path):
  path = tmp_path / "a.json"
  path.write_text('[{"image": "a.jpg", "caption": "a"}]')
  source = annotations.Annotations(path)
  path.unlink()
  with pytest.raises(sources.BadRow, match="FileNotFoundError") as bad:
    source[0]
  assert (bad.value.id, bad.value.reason) == ("a.json:0", "error")
