"""Spec strings, and examples made of records."""

import json
import os
import tarfile

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from blip_jax.data import (
  datasets,
  examples,
  randaugment,
  scenes,
  tfds,
  tokenizer,
  transforms,
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
    source = datasets.open_source(f"{tmp_path}/{name}", "/pictures")
    assert list(source) == [
      {"image": "/pictures/a.jpg", "caption": "c", "id": f"{name}:0"}
    ]


def _write_parquet(path, rows):
  parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_columns_are_options(tmp_path):
  row = {"image": "a.jpg", "photo": "b.jpg", "caption": "c", "1": "d"}
  (tmp_path / "a.json").write_text(json.dumps([row]))
  (tmp_path / "a.csv").write_text("image;photo;caption;1\na.jpg;b.jpg;c;d\n")
  _write_parquet(tmp_path / "a.parquet", [row])
  _make_pictures(tmp_path / "folder", ["b.jpg"])
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


def _make_pictures(folder, names):
  folder.mkdir()
  for name in names:
    (folder / name).touch()


def test_a_folder_is_a_source(tmp_path):
  folder = tmp_path / "photos"
  _make_pictures(folder, ["a.jpg", "b.jpg"])
  (folder / "a.txt").write_text("beside")
  assert datasets.open_source(f"{folder}/", "/elsewhere")[0] == {
    "image": f"{folder}/a.jpg",
    "caption": "beside",
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


def test_pictures_alone(tmp_path):
  folder = tmp_path / "photos"
  _make_pictures(folder, ["b.jpg", "a.png", "a.txt", ".c.jpg"])
  _make_pictures(folder / "sub", ["a.jpg"])
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


def test_pictures_of_captioned_sources(tmp_path):
  row = {"image": "a.jpg", "img_id": 3, "caption": None}
  picture = {"image": "/pictures/a.jpg", "image_id": 3}
  (tmp_path / "a.json").write_text(json.dumps([row]))
  (tmp_path / "a.csv").write_text("image,img_id\na.jpg,3\n")
  _write_parquet(tmp_path / "a.parquet", [row])
  for name in ("a.json", "a.csv", "a.parquet"):
    (record,) = datasets.open_images(f"{tmp_path}/{name}", "/pictures")
    assert record == {**picture, "id": f"{name}:0"}
  with tarfile.open(tmp_path / "0.tar", "w") as tar:
    tar.add(tmp_path / "a.json", "x.jpg")
  (record,) = datasets.open_images(f"{tmp_path}/*.tar")
  assert sorted(record) == ["id", "image"] and record["id"] == "0.tar:x"
  record = datasets.open_images("scenes:val?num=2")[1]
  assert sorted(record) == ["id", "image", "image_id"]


@pytest.mark.parametrize("spec", ["photos", "a.heic", "photos/a.json.gz", ""])
def test_what_holds_no_pictures_is_answered_by_what_may(spec):
  with pytest.raises(ValueError, match=r"(?s)No pictures in.*\.jpg.*scenes:"):
    datasets.open_images(spec)


def test_missing_pictures_are_said(tmp_path):
  with pytest.raises(ValueError, match=r"1 of 1 pictures do not exist.*a\.jpg"):
    datasets.open_images(f"{tmp_path}/a.jpg")
  with pytest.raises(ValueError, match=r"\*\.jpg: no such files"):
    datasets.open_images(f"{tmp_path}/*.jpg")
  with pytest.raises(ValueError, match=rf"{tmp_path}: expected pictures"):
    datasets.open_images(str(tmp_path))


def test_scenes_take_options():
  source = datasets.open_source("scenes:val?num=12&noise=0.5&seed=3")
  twin = scenes.Scenes("val", num=12, noise=0.5, seed=3)
  assert len(source) == 12
  captions = [source[i]["caption"] for i in range(12)]
  assert captions == [twin[i]["caption"] for i in range(12)]


def test_tfds_names_may_hold_versions(monkeypatch):
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
def test_an_unknown_spec_is_answered_by_those_understood(spec):
  with pytest.raises(ValueError, match=r"(?s)Understood:.*\.jsonl.*scenes:"):
    datasets.open_source(spec)


def test_patterns_expand_in_order(tmp_path):
  for name in ("b-10.tar", "b-9.tar", "a-1.tar", "c.txt"):
    (tmp_path / name).touch()
  names = [path.rpartition("/")[2] for path in datasets.expand(f"{tmp_path}/*")]
  assert names == ["a-1.tar", "b-10.tar", "b-9.tar", "c.txt"]
  assert datasets.expand("s/{0008..0011}.tar") == [
    f"s/{n}.tar" for n in ("0008", "0009", "0010", "0011")
  ]
  assert datasets.expand("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
  assert datasets.expand("plain.tar") == ["plain.tar"]
  assert datasets.expand("{a,b,a}") == ["a", "b"]
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub" / "b-9.tar").touch()
  assert datasets.expand(f"{tmp_path}/**/b-9.tar") == [
    f"{tmp_path}/b-9.tar",
    f"{tmp_path}/sub/b-9.tar",
  ]
  with pytest.raises(ValueError, match="no such files"):
    datasets.expand(f"{tmp_path}/*.json")


def test_rotating_splits_come_sorted(tmp_path):
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


@pytest.fixture(scope="module")
def words():
  return tokenizer.Tokenizer.load(scenes.vocab_dir())


def _picture():
  return np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)


def _record(caption):
  return {"image": _picture(), "caption": caption, "id": "x:0"}


def test_an_example_is_the_image_and_its_tokens(words):
  make = examples.PairExample(words, transforms.EvalImage(16), 4, 10)
  made = make(_record("A RED circle!!\x00 above a square"), _rng())
  ids, mask = words.encode(["a red circle above"], 10)
  np.testing.assert_array_equal(made["input_ids"], ids[0])
  np.testing.assert_array_equal(made["attention_mask"], mask[0])
  still = transforms.EvalImage(16)(_picture())
  np.testing.assert_array_equal(made["image"], still)
  assert made["image"].dtype == np.uint8 and made["input_ids"].dtype == np.int32


def _rng(seed=0):
  return np.random.default_rng(seed)


def test_a_training_image_depends_on_the_generator(words):
  augment = randaugment.RandAugment(2, 5)
  train = transforms.TrainImage(16, 0.2, augment)
  make = examples.PairExample(words, train)
  images = [make(_record("red"), _rng(seed))["image"] for seed in (0, 0, 1)]
  np.testing.assert_array_equal(images[0], images[1])
  assert (images[0] != images[2]).any()


def test_one_of_several_captions_is_drawn_each_visit(words):
  make = examples.PairExample(words, transforms.EvalImage(8))
  captions = ["a red circle", "a blue square", b"a green star"]
  made = [make(_record(captions), _rng(seed)) for seed in range(30)]
  texts = words.decode(np.stack([m["input_ids"] for m in made]))
  assert set(texts) == {"a red circle", "a blue square", "a green star"}


@pytest.mark.parametrize("caption", ["", " ", "...", '"!"'])
def test_a_caption_without_words_is_bad(words, caption):
  make = examples.PairExample(words, transforms.EvalImage(8))
  with pytest.raises(transforms.BadSample, match="empty_caption"):
    make(_record(caption), _rng())


def test_too_many_pixels_are_refused(words):
  make = examples.PairExample(
    words, transforms.EvalImage(8), max_pixels=40 * 30 - 1
  )
  with pytest.raises(transforms.BadSample, match="too_large"):
    make(_record("red"), _rng())
