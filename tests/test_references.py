"""References from any source, by the names that a run gives its images."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from blip_jax.data import datasets
from blip_jax.evaluators import references
from blip_jax.evaluators.scores.image_names import Image

ROWS = [
  ("./a/dog.jpg", "a dog"),
  ("0.png", "a cat"),
  ("a/dog.jpg", "one dog"),
  ("COCO_val2014_000000391895.jpg", "a bus"),
]
CAPTIONS = {
  Image(None, "a/dog.jpg"): ["a dog", "one dog"],
  Image(None, "0.png"): ["a cat"],
  Image(391895, "COCO_val2014_000000391895.jpg"): ["a bus"],
}


def read(path):
  found = references.read(str(path))
  assert len(found.images) == len(found.captions)
  return dict(zip(found.images, found.captions, strict=True))


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
  assert read(tmp_path / name) == CAPTIONS


def test_columns_have_any_of_the_usual_names(tmp_path):
  path = tmp_path / "r.json"
  path.write_text(json.dumps([{"file_name": "a.jpg", "text": "a dog"}]))
  assert read(path) == {Image(None, "a.jpg"): ["a dog"]}


def test_coco_annotations(tmp_path):
  path = tmp_path / "r.json"
  annotations = [{"image_id": 3, "id": n, "caption": f"{n}"} for n in (70, 71)]
  path.write_text(json.dumps({"annotations": annotations}))
  assert read(path) == {Image(3, "r.json:0"): ["70", "71"]}


@pytest.mark.parametrize("name", ["r.csv", "r.parquet", "r.jsonl"])
def test_an_id_is_enough_to_name_an_image(tmp_path, name):
  path = tmp_path / name
  rows = [(3, "a dog"), (4, "a cat"), (3, "dogs")]
  if name == "r.parquet":
    ids, captions = zip(*rows, strict=True)
    table = pyarrow.table({"image_id": ids, "caption": captions})
    pyarrow.parquet.write_table(table, path)
  elif name == "r.csv":
    lines = [f"{id},{caption}\n" for id, caption in rows]
    path.write_text("image_id,caption\n" + "".join(lines))
  else:
    rows_ = [{"image_id": id, "caption": caption} for id, caption in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_))
  found = references.read(str(path))
  assert [image.image_id for image in found.images] == [3, 4]
  assert found.captions == [["a dog", "dogs"], ["a cat"]]
  with pytest.raises(ValueError, match="image"):
    datasets.open_source(str(path))


def test_a_row_without_a_caption_is_left_out(tmp_path):
  path = tmp_path / "r.jsonl"
  rows = [{"image": "a.jpg", "caption": x} for x in (None, "a dog")]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert read(path) == {Image(None, "a.jpg"): ["a dog"]}


def test_what_is_no_source_is_refused(tmp_path):
  (tmp_path / "r.xyz").write_text("a")
  with pytest.raises(ValueError, match="Unknown data source"):
    references.read(str(tmp_path / "r.xyz"))


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_images_have_their_ids_and_their_paths(tmp_path, ending):
  """Ids that are numbers are the same, however they are written. Rows of one
  path are one image, even if only one of them has an id."""
  rows = [
    {"image": "1.png", "image_id": "0", "caption": "a"},
    {"image": "a/dog.png", "image_id": 1, "caption": "b"},
    {"image": "a/dog.png", "caption": "c"},
    {"image": "1.png", "image_id": 0, "caption": "d"},
    {"image_id": "0", "caption": "e"},
  ]
  path = tmp_path / f"r.{ending}"
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  path.write_text(json.dumps(rows) if ending == "json" else lines)
  assert read(path) == {
    Image("0", "1.png"): ["a", "d", "e"],
    Image(1, "a/dog.png"): ["b", "c"],
  }


def test_coco_annotations_have_paths(tmp_path):
  """If their image is listed."""
  path = tmp_path / "r.json"
  content = {
    "images": [{"id": 3, "file_name": "dog.jpg"}, {"id": 4}],
    "annotations": [
      {"image_id": n, "caption": f"{n}"} for n in (3, 4, 5, 4, 5, 3)
    ],
  }
  path.write_text(json.dumps(content))
  assert read(path) == {
    Image(3, "dog.jpg"): ["3", "3"],
    Image(4, "r.json:1"): ["4", "4"],
    Image(5, "r.json:2"): ["5", "5"],
  }


NAN = float("nan")


@pytest.mark.parametrize("empty", [None, "", " \n", "...", NAN])
@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("name", ["r.json", "r.jsonl", "coco.json"])
def test_an_empty_text_is_no_reference(tmp_path, name, as_list, empty):
  """It is counted once; the other captions of its image stay."""
  texts = [("a.jpg", "a dog"), ("a.jpg", empty), ("b.jpg", "a cat")]
  rows = [{"image": image, "caption": text} for image, text in texts]
  if as_list:
    rows = [{"image": "a.jpg", "caption": ["a dog", empty]}, rows[-1]]
  bad = "#1" if as_list else ":1"
  if name == "coco.json":
    bad = ":0#1"
    images = [
      {"id": n, "file_name": f} for n, f in enumerate(("a.jpg", "b.jpg"))
    ]
    rows = {
      "images": images,
      "annotations": [
        {"image_id": int(image == "b.jpg"), "caption": text}
        for image, text in texts
      ],
    }
  path = tmp_path / name
  lines = (
    "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith("l")
    else json.dumps(rows)
  )
  path.write_text(lines)
  found = references.read(str(path))
  assert found.captions == [["a dog"], ["a cat"]]
  (lost,) = found.bad
  assert lost.id.endswith(bad) and lost.reason == "empty_caption"


def test_a_file_without_any_caption_is_refused(tmp_path):
  path = tmp_path / "r.json"
  path.write_text(json.dumps([{"image": "a.jpg", "caption": ""}] * 3))
  with pytest.raises(
    ValueError, match=r"r.json: .* none in 3 rows, .*r.json:0"
  ):
    references.read(str(path))


def test_a_whole_file_of_karpathy_needs_its_split(tmp_path):
  path = tmp_path / "r.json"
  image = {"filename": "a.jpg", "split": "val", "sentences": [{"raw": "a dog"}]}
  path.write_text(json.dumps({"images": [image]}))
  with pytest.raises(ValueError, match=r"expected \?split=NAME"):
    references.read(str(path))
  assert read(f"{path}?split=val") == {Image(None, "a.jpg"): ["a dog"]}
