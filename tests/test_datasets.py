"""Specs of sources."""

import gzip
import json
import os
import tarfile

import pyarrow
import pytest
from pyarrow import parquet

from blip_jax.data import (
  datasets,
  scenes,
  specs,
  tfds,
)


def test_annotations_are_opened_by_extension(tmp_path):
  row = {"image": "a.jpg", "caption": "c"}
  (tmp_path / "a.json").write_text(json.dumps([row]))
  (tmp_path / "a.jsonl").write_text(json.dumps(row))
  (tmp_path / "a.csv").write_text("image,caption\na.jpg,c\n")
  (tmp_path / "a.tsv").write_text("image\tcaption\na.jpg\tc\n")
  (tmp_path / "B.JSONL").write_text(json.dumps(row))
  _write_parquet(tmp_path / "a.parquet", [row])
  for name in ("a.json", "a.jsonl", "B.JSONL", "a.csv", "a.tsv", "a.parquet"):
    source = datasets.open_source(f"{tmp_path}/{name}", "/images")
    assert list(source) == [
      {"image": "/images/a.jpg", "caption": "c", "id": f"{name}:0"}
    ]


def _write_parquet(path, rows):
  parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_columns_are_options(tmp_path):
  row = {"image": "a.jpg", "photo": "b.jpg", "caption": "c", "1": "d"}
  (tmp_path / "a.json").write_text(json.dumps([row]))
  (tmp_path / "a.csv").write_text("image;photo;caption;1\na.jpg;b.jpg;c;d\n")
  _write_parquet(tmp_path / "a.parquet", [row])
  _make_images(tmp_path / "folder", ["b.jpg"])
  (tmp_path / "folder" / "metadata.jsonl").write_text(json.dumps(row))
  for name in ("a.json", "a.csv?delimiter=;", "a.parquet", "folder"):
    query = ("&" if "?" in name else "?") + "image=photo&caption=1"
    (record,) = datasets.open_source(f"{tmp_path}/{name}{query}")
    assert os.path.basename(record["image"]) == "b.jpg"
    assert record["caption"] == "d"
  for name in ("a.json", "a.csv", "a.parquet"):
    with pytest.raises(
      ValueError, match=r"'image_root'; there are \['image', "
    ):
      datasets.open_source(f"{tmp_path}/{name}?image_root=x")


def _make_images(folder, names):
  folder.mkdir()
  for name in names:
    (folder / name).touch()


def test_a_folder_is_a_source(tmp_path):
  folder = tmp_path / "photos"
  _make_images(folder, ["a.jpg", "b.jpg"])
  (folder / "a.txt").write_text("next to it")
  assert datasets.open_source(f"{folder}/", "/elsewhere")[0] == {
    "image": f"{folder}/a.jpg",
    "caption": "next to it",
    "id": "a.jpg",
  }
  with pytest.raises(ValueError, match=r"no option 'caption'; there are \[\]"):
    datasets.open_source(f"{folder}?caption=title")
  table = "file_name,text\nb.jpg,in a table\n"
  (folder / "metadata.csv").write_text(table)
  assert list(datasets.open_source(str(folder), "/elsewhere")) == [
    {
      "image": f"{folder}/b.jpg",
      "caption": "in a table",
      "id": "metadata.csv:0",
    }
  ]


def test_images_of_a_folder_or_pattern(tmp_path):
  folder = tmp_path / "photos"
  _make_images(folder, ["b.jpg", "a.png", "a.txt", ".c.jpg"])
  _make_images(folder / "sub", ["a.jpg"])
  (folder / "metadata.csv").write_text("file_name,text\nb.jpg,one\n")
  root = str(folder)

  def ids(spec):
    source = datasets.open_images(spec)
    names = [record.pop("id") for record in source]
    paths = [record["image"] for record in source]
    top = spec.startswith(f"{root}/sub/")
    base = f"{root}/sub" if top else root
    assert paths == [f"{base}/{name}" for name in names]
    assert all(sorted(record) == ["id", "image"] for record in source)
    return names

  assert ids(root) == ["a.png", "b.jpg", "sub/a.jpg"]
  assert ids(f"{root}/") == ["a.png", "b.jpg", "sub/a.jpg"]
  assert ids(f"{root}/b.jpg") == ["b.jpg"]
  assert ids(f"{root}/sub/a.jpg") == ["a.jpg"]
  assert ids(f"{root}/*") == ["a.png", "b.jpg"]
  assert ids(f"{root}/?.jpg") == ["b.jpg"]
  assert ids(f"{root}/**/*.jpg") == ["b.jpg", "sub/a.jpg"]
  assert ids(f"{root}/{{b,sub/a,b}}.jpg") == ["b.jpg", "sub/a.jpg"]
  assert ids(f"{root}/*.{{png,jpg}}") == ["a.png", "b.jpg"]


def test_images_of_captioned_sources(tmp_path):
  row = {"image": "a.jpg", "img_id": 3, "caption": None}
  image = {"image": "/images/a.jpg", "image_id": 3}
  (tmp_path / "a.json").write_text(json.dumps([row]))
  (tmp_path / "a.csv").write_text("image,img_id\na.jpg,3\n")
  _write_parquet(tmp_path / "a.parquet", [row])
  for name in ("a.json", "a.csv", "a.parquet"):
    (record,) = datasets.open_images(f"{tmp_path}/{name}", "/images")
    assert record == {**image, "id": f"{name}:0"}
  with tarfile.open(tmp_path / "0.tar", "w") as tar:
    tar.add(tmp_path / "a.json", "x.jpg")
  (record,) = datasets.open_images(f"{tmp_path}/*.tar")
  assert sorted(record) == ["id", "image"] and record["id"] == "0.tar:x"
  record = datasets.open_images("scenes:val?num=2")[1]
  assert sorted(record) == ["id", "image", "image_id"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.token"])
def test_compressed_files_and_utf_16_are_refused_with_advice(tmp_path, name):
  text = '[{"image": "a.jpg", "caption": "c"}]'
  for raw, advice in (
    (gzip.compress(text.encode()), "gunzip"),
    (text.encode("utf-16"), "iconv -f UTF-16"),
    (text.encode("utf-16-le"), "iconv -f UTF-16"),
  ):
    (tmp_path / name).write_bytes(raw)
    for open_rows in (datasets.open_source, datasets.open_images):
      with pytest.raises(ValueError, match=rf"{name}: expected .*{advice}"):
        open_rows(f"{tmp_path}/{name}")
      with pytest.raises(ValueError, match=r"\.gz'.* Decompress it first"):
        open_rows(f"{tmp_path}/{name}.gz")


@pytest.mark.parametrize("spec", ["photos", "a.heic", "photos/a.json.gz", ""])
def test_a_spec_without_images_is_answered_with_those_supported(spec):
  with pytest.raises(ValueError, match=r"(?s)No images in.*\.jpg.*scenes:"):
    datasets.open_images(spec)


def test_missing_images_are_reported(tmp_path):
  with pytest.raises(ValueError, match=r"1 of 1 images do not exist.*a\.jpg"):
    datasets.open_images(f"{tmp_path}/a.jpg")
  with pytest.raises(ValueError, match=r"\*\.jpg: no such files"):
    datasets.open_images(f"{tmp_path}/*.jpg")
  with pytest.raises(ValueError, match=rf"{tmp_path}: expected images"):
    datasets.open_images(str(tmp_path))


def test_scenes_take_options():
  source = datasets.open_source("scenes:val?num=12&noise=0.5&seed=3")
  expected = scenes.Scenes("val", num=12, noise=0.5, seed=3)
  assert len(source) == 12
  captions = [source[i]["caption"] for i in range(12)]
  assert captions == [expected[i]["caption"] for i in range(12)]


def test_tfds_names_may_have_versions(monkeypatch):
  calls = []
  monkeypatch.setattr(tfds, "Tfds", _recorder(calls))
  datasets.open_source("tfds:coco/2014:1.1.0:train?caption=title&image=photo")
  datasets.open_source("tfds:/some/dir:val")
  assert calls == [
    ("coco/2014:1.1.0", "train", {"caption": "title", "image": "photo"}),
    ("/some/dir", "val", {}),
  ]
  with pytest.raises(ValueError, match="expected tfds:NAME:SPLIT"):
    datasets.open_source("tfds:coco")


def _recorder(calls):
  def record(name, split, with_captions, image="image", caption=None):
    given = {"caption": caption, "image": image}
    calls.append((name, split, given if caption else {}))
    return calls

  return record


def test_an_unknown_option_is_refused():
  with pytest.raises(
    ValueError, match=r"no option 'nois'; there are .*'noise'"
  ):
    datasets.open_source("scenes:train?nois=0.3")


@pytest.mark.parametrize("spec", ["photos", "a.xml", "shards/0.tar.gz", ""])
def test_an_unknown_spec_is_answered_with_those_supported(spec):
  with pytest.raises(ValueError, match=r"(?s)Understood:.*\.jsonl.*scenes:"):
    datasets.open_source(spec)


def test_patterns_expand_in_order(tmp_path):
  for name in ("b-10.tar", "b-9.tar", "a-1.tar", "c.txt"):
    (tmp_path / name).touch()
  names = [path.rpartition("/")[2] for path in specs.expand(f"{tmp_path}/*")]
  assert names == ["a-1.tar", "b-10.tar", "b-9.tar", "c.txt"]
  assert specs.expand("s/{0008..0011}.tar") == [
    f"s/{n}.tar" for n in ("0008", "0009", "0010", "0011")
  ]
  assert specs.expand("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
  assert specs.expand("plain.tar") == ["plain.tar"]
  assert specs.expand("{a,b,a}") == ["a", "b"]
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub" / "b-9.tar").touch()
  assert specs.expand(f"{tmp_path}/**/b-9.tar") == [
    f"{tmp_path}/b-9.tar",
    f"{tmp_path}/sub/b-9.tar",
  ]
  with pytest.raises(ValueError, match="no such files"):
    specs.expand(f"{tmp_path}/*.json")


def test_rotating_splits_are_sorted(tmp_path):
  for name in ("split_2", "split_0", "split_1"):
    row = json.dumps({"image": name, "caption": "c"})
    (tmp_path / f"{name}.json").write_text(f"[{row}]")
  splits = datasets.open_rotation(f"{tmp_path}/*.json")
  assert [split[0]["image"] for split in splits] == [
    "split_0",
    "split_1",
    "split_2",
  ]


def test_rotating_splits_take_options(tmp_path):
  for name in ("split_1", "split_0"):
    (tmp_path / f"{name}.csv").write_text(f"image,title\n{name},one\n")
  splits = datasets.open_rotation(f"{tmp_path}/*.csv?caption=title")
  assert [split[0]["image"] for split in splits] == ["split_0", "split_1"]


OPEN_ROWS = [datasets.open_source, datasets.open_images]
ROW = {"image": "a.jpg", "caption": "c", "question": "q?", "answer": "b"}


@pytest.fixture(params=["json", "jsonl", "csv", "parquet", "folder", "tar"])
def spec_with_columns(request, tmp_path):
  """Makes a source of one row with a question and an answer."""
  row = ROW | {"image": f"{tmp_path}/a.jpg"}
  header = ",".join(row)
  fields = ",".join(row.values())
  path = tmp_path / f"a.{request.param}"
  match request.param:
    case "json":
      path.write_text(json.dumps([row]))
    case "jsonl":
      path.write_text(json.dumps(row))
    case "csv":
      path.write_text(f"{header}\n{fields}\n")
    case "parquet":
      _write_parquet(path, [row])
    case "folder":
      _make_images(path, ["a.jpg", "not in the table.jpg"])
      (path / "metadata.csv").write_text(f"{header}\n{fields}\n")
    case "tar":
      (tmp_path / "row.json").write_text(json.dumps(row))
      with tarfile.open(path, "w") as tar:
        tar.add(tmp_path / "row.json", "a.jpg")
        tar.add(tmp_path / "row.json", "a.json")
  return str(path)


@pytest.mark.parametrize("open_rows", OPEN_ROWS)
def test_columns_to_keep_are_an_option_and_an_argument(
  spec_with_columns, open_rows
):
  texts = {"image", "id"}
  if open_rows is datasets.open_source:
    texts.add("caption")
  for query, keep, kept in (
    ("?keep=question,answer", (), {"question", "answer"}),
    ("", ("answer", "question"), {"question", "answer"}),
    ("?keep=question", ["answer", "question"], {"question", "answer"}),
    ("?keep=answer", (), {"answer"}),
    ("", [], set()),
  ):
    record = open_rows(spec_with_columns + query, keep=keep)[0]
    assert set(record) == texts | kept
    assert all(record[name] == ROW[name] for name in kept)


@pytest.mark.parametrize("open_rows", OPEN_ROWS)
def test_unknown_columns_cannot_be_kept(spec_with_columns, open_rows):
  for query, keep in (("?keep=question,title", ()), ("", ("title",))):
    with pytest.raises(ValueError, match=r"\['title'\].*'question', 'answer'"):
      open_rows(spec_with_columns + query, keep=keep)
  with pytest.raises(ValueError, match=r"keep=.*'caption'. cannot be kept"):
    open_rows(spec_with_columns + "?keep=caption")


def test_files_without_a_table_have_no_columns(tmp_path):
  _make_images(tmp_path / "photos", ["a.jpg"])
  (tmp_path / "photos" / "a.txt").write_text("one")
  folder = str(tmp_path / "photos")
  message = r"keep \['title'\], found only files.*metadata\.csv"
  for open_rows in (datasets.open_source, datasets.open_images):
    with pytest.raises(ValueError, match=message):
      open_rows(folder, keep=("title",))
    with pytest.raises(ValueError, match=message):
      open_rows(f"{folder}?keep=title")
  with pytest.raises(ValueError, match=message):
    datasets.open_images(f"{folder}/*.jpg", keep=("title",))
  with pytest.raises(ValueError, match=message):
    datasets.open_videos(folder, keep=("title",))


def test_scenes_keep_what_they_have():
  spec = "scenes:val?num=2&noise=0.5"
  expected = datasets.open_source(spec)
  source = datasets.open_source(f"{spec}&keep=noise", keep=("references",))
  for index in range(2):
    assert source[index].keys() == expected[index].keys()
    assert source[index]["references"] == expected[index]["references"]
  with pytest.raises(ValueError, match=r"\['title'\].*'references'"):
    datasets.open_source(spec, keep=("title",))


def test_rotating_splits_keep_columns(tmp_path):
  for name in ("split_1", "split_0"):
    (tmp_path / f"{name}.csv").write_text(f"image,text,size\n{name},one,3\n")
  splits = datasets.open_rotation(f"{tmp_path}/*.csv", keep=("size",))
  assert [split[0]["size"] for split in splits] == ["3", "3"]


def test_tfds_gets_the_columns_to_keep(monkeypatch):
  calls = []

  def tfds_source(name, split, with_captions, keep=()):
    calls.append((name, split, with_captions, keep))
    return calls

  monkeypatch.setattr(tfds, "Tfds", tfds_source)
  datasets.open_images("tfds:coco:train?keep=objects", keep=("answer",))
  assert calls == [("coco", "train", False, ("answer", "objects"))]


@pytest.mark.parametrize("delimiter", "+;|")
def test_a_plus_among_options_is_a_plus(tmp_path, delimiter):
  """It is a space only in forms on the web."""
  path = tmp_path / "a.csv"
  column = "c" if delimiter == "+" else "c++"
  path.write_text(f"{column}{delimiter}a b\na.jpg{delimiter}a book\n")
  spec = (
    f"{path}?delimiter={delimiter}&image={column}&caption=a b&keep={column}"
  )
  record = datasets.open_source(spec)[0]
  assert (record["image"], record["caption"]) == ("a.jpg", "a book")
  assert record[column] == "a.jpg"
