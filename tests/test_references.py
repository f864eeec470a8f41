"""References from any source, by the names that a run gives its images."""

import csv
import json

import pytest

from blip_jax.evaluators import references

ROWS = [
  ("./a/dog.jpg", "a dog"),
  ("0.png", "a cat"),
  ("a/dog.jpg", "one dog"),
  ("COCO_val2014_000000391895.jpg", "a bus"),
]
CAPTIONS = {"dog.jpg": ["a dog", "one dog"], 0: ["a cat"], 391895: ["a bus"]}


def write(path):
  """The rows in the format of the file's ending."""
  image, caption = "image", "caption"
  if "?" in path.name:
    image, caption = "photo", "title"
  rows = [{image: name, caption: text} for name, text in ROWS]
  file = path.with_name(path.name.partition("?")[0])
  if file.suffix == ".csv":
    with file.open("w", newline="") as stream:
      writer = csv.DictWriter(stream, rows[0])
      writer.writeheader()
      writer.writerows(rows)
  elif file.suffix == ".jsonl":
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  else:
    file.write_text(json.dumps(rows))


@pytest.mark.parametrize(
  "name", ["r.json", "r.jsonl", "r.csv", "r.json?image=photo&caption=title"]
)
def test_rows_of_one_image_are_combined(tmp_path, name):
  write(tmp_path / name)
  assert references.read(str(tmp_path / name)).captions == CAPTIONS


def test_columns_have_any_of_the_usual_names(tmp_path):
  path = tmp_path / "r.json"
  path.write_text(json.dumps([{"file_name": "a.jpg", "text": "a dog"}]))
  assert references.read(str(path)).captions == {"a.jpg": ["a dog"]}


def test_coco_annotations(tmp_path):
  path = tmp_path / "r.json"
  annotations = [{"image_id": 3, "id": n, "caption": f"{n}"} for n in (70, 71)]
  path.write_text(json.dumps({"annotations": annotations}))
  assert references.read(str(path)).captions == {3: ["70", "71"]}


def test_a_row_without_a_caption_is_left_out(tmp_path):
  path = tmp_path / "r.jsonl"
  rows = [{"image": "a.jpg", "caption": x} for x in (None, "a dog")]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert references.read(str(path)).captions == {"a.jpg": ["a dog"]}


def test_what_is_no_source_is_refused(tmp_path):
  (tmp_path / "r.xyz").write_text("a")
  with pytest.raises(ValueError, match="Unknown data source"):
    references.read(str(tmp_path / "r.xyz"))


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_images_with_an_id_have_names_by_path_too(tmp_path, ending):
  """Numbers in file names are not the ids."""
  rows = [
    {"image": "1.png", "image_id": "0", "caption": "a"},
    {"image": "a/dog.png", "image_id": 1, "caption": "b"},
    {"image": "b/dog.png", "image_id": 2, "caption": "c"},
  ]
  path = tmp_path / f"r.{ending}"
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  path.write_text(json.dumps(rows) if ending == "json" else lines)
  read = references.read(str(path))
  assert read.captions == {0: ["a"], 1: ["b"], 2: ["c"]}
  assert read.by_path() == {1: ["a"], "a/dog.png": ["b"], "b/dog.png": ["c"]}


def test_coco_annotations_have_paths(tmp_path):
  path = tmp_path / "r.json"
  content = {
    "images": [{"id": 3, "file_name": "dog.jpg"}, {"id": 4}],
    "annotations": [{"image_id": n, "caption": f"{n}"} for n in (3, 4)],
  }
  path.write_text(json.dumps(content))
  read = references.read(str(path))
  assert read.by_path() == {"dog.jpg": ["3"], 4: ["4"]}
