"""Spec strings, and examples made of records."""

import json

import numpy as np
import pytest

from blip_jax.data import (
  datasets,
  randaugment,
  scenes,
  sources,
  tokenizer,
  transforms,
)


def test_annotations_are_opened_by_extension(tmp_path):
  row = {"image": "a.jpg", "caption": "c"}
  (tmp_path / "a.json").write_text(json.dumps([row]))
  (tmp_path / "a.jsonl").write_text(json.dumps(row))
  for name in ("a.json", "a.jsonl"):
    source = datasets.open_source(f"{tmp_path}/{name}", "/pictures")
    assert source[0]["image"] == "/pictures/a.jpg"


def test_scenes_take_options():
  source = datasets.open_source("scenes:val?num=12&noise=0.5&seed=3")
  twin = scenes.Scenes("val", num=12, noise=0.5, seed=3)
  assert len(source) == 12
  captions = [source[i]["caption"] for i in range(12)]
  assert captions == [twin[i]["caption"] for i in range(12)]


def test_tfds_names_may_hold_versions(monkeypatch):
  calls = []
  monkeypatch.setattr(sources, "Tfds", _recorder(calls))
  datasets.open_source("tfds:coco/2014:1.1.0:train?caption=title&image=photo")
  datasets.open_source("tfds:/some/dir:val")
  assert calls == [
    ("coco/2014:1.1.0", "train", {"caption": "title", "image": "photo"}),
    ("/some/dir", "val", {}),
  ]
  with pytest.raises(ValueError, match="expected tfds:NAME:SPLIT"):
    datasets.open_source("tfds:coco")


def _recorder(calls):
  def record(name, split, image="image", caption=None):
    given = {"caption": caption, "image": image}
    calls.append((name, split, given if caption else {}))

  return record


def test_an_unknown_option_is_refused():
  with pytest.raises(
    ValueError, match=r"no option 'nois'; there are .*'noise'"
  ):
    datasets.open_source("scenes:train?nois=0.3")


@pytest.mark.parametrize("spec", ["photos", "a.csv", "shards/0.tar.gz", ""])
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


@pytest.fixture(scope="module")
def words():
  return tokenizer.Tokenizer.load(scenes.vocab_dir())


def _picture():
  return np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)


def _record(caption):
  return {"image": _picture(), "caption": caption, "id": "x:0"}


def test_an_example_is_the_image_and_its_tokens(words):
  make = datasets.PretrainExample(words, transforms.EvalImage(16), 4, 10)
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
  make = datasets.PretrainExample(words, train)
  images = [make(_record("red"), _rng(seed))["image"] for seed in (0, 0, 1)]
  np.testing.assert_array_equal(images[0], images[1])
  assert (images[0] != images[2]).any()


def test_one_of_several_captions_is_drawn_each_visit(words):
  make = datasets.PretrainExample(words, transforms.EvalImage(8))
  captions = ["a red circle", "a blue square", b"a green star"]
  made = [make(_record(captions), _rng(seed)) for seed in range(30)]
  texts = words.decode(np.stack([m["input_ids"] for m in made]))
  assert set(texts) == {"a red circle", "a blue square", "a green star"}


@pytest.mark.parametrize("caption", ["", " ", "...", '"!"'])
def test_a_caption_without_words_is_bad(words, caption):
  make = datasets.PretrainExample(words, transforms.EvalImage(8))
  with pytest.raises(transforms.BadSample, match="empty_caption"):
    make(_record(caption), _rng())


def test_too_many_pixels_are_refused(words):
  make = datasets.PretrainExample(
    words, transforms.EvalImage(8), max_pixels=40 * 30 - 1
  )
  with pytest.raises(transforms.BadSample, match="too_large"):
    make(_record("red"), _rng())
