"""Files of captions: accepted formats, and refusals."""

import json

import pytest

from blip_jax.evaluators.scores import caption_files
from blip_jax.evaluators.scores.image_names import Image


@pytest.fixture
def write(tmp_path):
  def write(content):
    path = tmp_path / "captions.json"
    if not isinstance(content, str | bytes):
      content = json.dumps(content)
    if isinstance(content, str):
      content = content.encode()
    path.write_bytes(content)
    return path

  return write


def test_results(write):
  path = write(
    [
      {"image_id": 391895, "caption": "a man", "score": 1},
      {"image_id": "12", "caption": ""},
      {"image_id": "Scene1_0.png", "caption": "Café"},
    ]
  )
  results = caption_files.read_results(path)
  assert results == {
    Image(391895): "a man",
    Image("12"): "",
    Image("Scene1_0.png"): "Café",
  }


def test_results_of_the_caption_job(tmp_path):
  """One line is of an image that could not be read; an image of two rows has
  its first caption; a list says which image a line is of, a folder need not."""
  lines = [
    {"row": 0, "id": "val.json:0", "image": "p/dog.jpg", "caption": "a dog"},
    {"row": 1, "id": "val.json:1", "image": "p/dog.jpg", "caption": "a cat"},
    {"row": 2, "id": "val.json:2", "image": "p/x.jpg", "error": "missing: x"},
    {"row": 3, "id": "deep/12.jpg", "caption": "a bus", "log_prob": -1.5},
    {"row": 4, "id": "a.tar:0", "image_id": "391895", "caption": "a car"},
    {"row": 5, "id": "00000.tar:000001", "caption": "é"},
  ]
  path = tmp_path / "captions.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  assert caption_files.read_results(path) == {
    Image(None, "p/dog.jpg"): "a dog",
    Image(None, "deep/12.jpg"): "a bus",
    Image("391895"): "a car",
    Image(None, "00000.tar:000001"): "é",
  }
  path.write_text(json.dumps(lines[0]) + '\n{"row": 1, ')
  with pytest.raises(ValueError, match=r"jsonl: row 1: .*Is the file compl"):
    caption_files.read_results(path)


def test_results_may_have_paths(write):
  """COCO's names of files contain the id."""
  rows = [
    {"image_id": 5, "image": "./img/5.png", "caption": "a"},
    {"image": "img/6.png", "caption": "b"},
    {"image": "v/COCO_val2014_000000391895.jpg", "caption": "c"},
    {"image_id": "COCO_val2014_000000391896.jpg", "caption": "d"},
  ]
  assert caption_files.read_results(write(rows)) == {
    Image(5, "img/5.png"): "a",
    Image(None, "img/6.png"): "b",
    Image(391895, "v/COCO_val2014_000000391895.jpg"): "c",
    Image(391896): "d",
  }


def test_rows_of_one_path_are_one_image_of_the_job(tmp_path):
  """Even if only one of them has an id."""
  rows = [
    {"row": 0, "id": "a:0", "image": "p/0.png", "caption": "a dog"},
    {"row": 1, "id": "a:1", "image": "p/0.png", "image_id": 7, "caption": "b"},
    {"row": 2, "id": "a:2", "image": "p/1.png", "image_id": 8, "caption": "c"},
  ]
  path = tmp_path / "captions.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert caption_files.read_results(path) == {
    Image(7, "p/0.png"): "a dog",
    Image(8, "p/1.png"): "c",
  }


def test_a_byte_order_mark_is_skipped(write):
  text = json.dumps([{"image_id": 1, "caption": "é"}])
  path = write(text.encode("utf-8-sig"))
  assert caption_files.read_results(path) == {Image(1): "é"}


ROW = {"image_id": 1, "caption": "a dog"}


@pytest.mark.parametrize(
  "content, message",
  [
    ([], "the list is empty; expected at least one"),
    (
      [ROW, {**ROW, "image_id": "1"}],
      "rows 0 and 1 are both captions of",
    ),
    ({"a": 1}, r"expected a list of objects .*, found .* the keys \['a'\]"),
    ("7", "expected a list of objects .*, found int 7"),
    ([ROW, "a dog"], "row 1: expected an object .*, found str 'a dog'"),
    ([{"caption": "a dog"}], r"row 0: expected 'image_id'.*\['caption'\]"),
    ([{**ROW, "image_id": 1.5}], "row 0: expected a number .* float 1.5"),
    ([{**ROW, "image_id": True}], "row 0: expected a number .* bool True"),
    ([{**ROW, "image_id": None}], "row 0: expected a number .* NoneType None"),
    (
      [{"image_id": 1}],
      "expected a string under 'caption', found NoneType",
    ),
    ([{**ROW, "caption": ["a"]}], r"row 0: expected a string .* list \['a'\]"),
    ("", "expected one JSON list or object: Expecting value: line 1 column 1"),
    (
      '[{"image_id": 1',
      "expected one JSON .*line 1 column 16.*Is the file compl",
    ),
    ("<html>", "expected one JSON list or object: Expecting value"),
    ("[" * 100_000, "expected one JSON list or object: .*recursion"),
    (b"[\xff]", r"not UTF-8 \(byte 1\)"),
  ],
)
def test_malformed_results_are_refused(write, content, message):
  path = write(content)
  with pytest.raises(ValueError, match=message) as error:
    caption_files.read_results(path)
  assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
  for path in (tmp_path / "none.json", tmp_path):
    with pytest.raises(ValueError, match=f"{path}: (No such|Is a dir)"):
      caption_files.read_results(path)
