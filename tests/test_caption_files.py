"""Files of captions: accepted formats, and refusals."""

import json

import pytest

from blip_jax.evaluators.scores import caption_files


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
  # Ids that are numbers are the same, however they are written.
  assert results == {391895: "a man", 12: "", "Scene1_0.png": "Café"}


def test_coco_annotations(write):
  path = write(
    {
      "images": [{"id": 3, "file_name": "3.jpg"}, {"id": 4}],
      "annotations": [
        {"image_id": 3, "id": 70, "caption": "a dog"},
        {"image_id": 1, "id": 71, "caption": "a cat"},
        {"image_id": 3, "id": 72, "caption": "one dog"},
      ],
    }
  )
  assert caption_files.read_references(path) == {
    3: ["a dog", "one dog"],
    1: ["a cat"],
  }


@pytest.mark.parametrize(
  "file, image_id",
  [
    ("val2014/COCO_val2014_000000391895.jpg", 391895),
    ("COCO_test2014_000000000007.jpg", 7),
    ("/a/000000391895_test.0/train2017/000000000012.png", 12),
    ("flickr30k-images/1007129816.jpg", 1007129816),
    ("12", 12),
  ],
)
def test_rows_of_a_karpathy_split(write, file, image_id):
  captions = ["a man", "one man"]
  path = write([{"image": file, "caption": captions}])
  assert caption_files.read_references(path) == {image_id: captions}
  # As for training, a row per caption.
  path = write([{"image": file, "caption": text} for text in captions])
  assert caption_files.read_references(path) == {image_id: captions}


def test_rows_of_one_file_are_combined(write):
  rows = [
    {"image": path, "caption": text}
    for path, text in (("./a.jpg", "one"), ("b/a.jpg", "two"), ("a.jpg", "on"))
  ]
  references = caption_files.read_references(write(rows))
  assert references == {"a.jpg": ["one", "on"], "b/a.jpg": ["two"]}


def test_rows_of_one_image_id_are_combined(write):
  """However the id is written."""
  rows = [{"image_id": x, "caption": f"{x!r}"} for x in (7, "7", "7a", 7)]
  references = caption_files.read_references(write(rows))
  assert references == {7: ["7", "'7'", "7"], "7a": ["'7a'"]}


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
    "dog.jpg": "a dog",
    12: "a bus",
    391895: "a car",
    "00000.tar:000001": "é",
  }
  path.write_text(json.dumps(lines[0]) + '\n{"row": 1, ')
  with pytest.raises(ValueError, match=r"jsonl: row 1: .*Is the file compl"):
    caption_files.read_results(path)


def test_an_image_id_wins_over_the_file_name(write):
  rows = [
    {"image": "a_1.jpg", "image_id": 5, "caption": "a"},
    {"image": "b_1.jpg", "image_id": "x1", "caption": ["b"]},
  ]
  assert caption_files.read_references(write(rows)) == {5: ["a"], "x1": ["b"]}


@pytest.mark.parametrize(
  "content, expected",
  [
    ([{"image": "a.jpg", "caption": "a"}], True),
    ([{"image_id": 1, "caption": "a"}], True),
    ({"images": [], "annotations": []}, True),
    # Names of columns that only `data.sources` knows, or no image at all.
    ([{"file_name": "a.jpg", "caption": "a"}], False),
    ([{"image": "a.jpg", "text": "a"}], False),
    ([{"caption": "a"}], False),
  ],
)
def test_files_of_references_are_known_by_their_first_row(
  write, content, expected
):
  assert caption_files.has_references(write(content)) is expected


def test_only_json_has_references(tmp_path):
  assert not caption_files.has_references(tmp_path / "captions.jsonl")


def test_a_byte_order_mark_is_skipped(write):
  text = json.dumps([{"image_id": 1, "caption": "é"}])
  path = write(text.encode("utf-8-sig"))
  assert caption_files.read_results(path) == {1: "é"}


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


@pytest.mark.parametrize(
  "content, message",
  [
    ({"images": []}, r"expected COCO's 'annotations', found .* \['images'\]"),
    ({"annotations": {}}, "expected a list of objects"),
    ({"annotations": [{"caption": "a"}]}, "row 0: expected 'image_id'"),
    ([{"image": 5, "caption": ["a"]}], "row 0: expected 'image_id', or a file"),
    ([{**ROW, "caption": ["a", 5]}], "row 0: expected a string .* int 5"),
  ],
)
def test_malformed_references_are_refused(write, content, message):
  path = write(content)
  with pytest.raises(ValueError, match=message) as error:
    caption_files.read_references(path)
  assert str(path) in str(error.value)


@pytest.mark.parametrize(
  "read", [caption_files.read_results, caption_files.read_references]
)
def test_a_missing_file_is_named(tmp_path, read):
  for path in (tmp_path / "none.json", tmp_path):
    with pytest.raises(ValueError, match=f"{path}: (No such|Is a dir)"):
      read(path)
