"""From the rows of a job to a training set."""

import json

import pytest

from blip_jax import defaults
from blip_jax.capfilt import merge
from blip_jax.data import datasets
from tests import jobs
from tests.jobs import IMAGE_TEXTS


@pytest.fixture
def listed(tmp_path):
  return jobs.write_listed_capfilt_job(tmp_path)


def run(config):
  return merge.merge(config, config.out)


def captions(path):
  source = datasets.open_source(str(path))
  return [source[n]["caption"] for n in range(len(source))]


def test_training_reads_the_texts_that_are_kept(listed, tmp_path):
  stats = run(listed)
  assert stats == {
    "synthetic/in": 5,
    "synthetic/kept": 4,
    "synthetic/near_duplicate": 1,
    "web/below_threshold": 2,
    "web/in": 4,
    "web/kept": 2,
  }
  assert json.loads((tmp_path / "clean.json.stats.json").read_text()) == stats
  source = datasets.open_source(str(tmp_path / "clean.json"), listed.image_root)
  assert len(source) == 6
  assert source[0]["caption"] == "A red circle."
  assert source[1]["caption"] == "a red circle left of a blue star"
  assert source[0]["image"] == f"{listed.image_root}/0.png"
  assert source[0]["image_id"] == "0"
  first = json.loads((tmp_path / "clean.json").read_text())[0]
  assert first["image"] == "0.png"
  assert first["source"] == "web"
  assert first["itm_prob"] == pytest.approx(0.9)


def test_threshold_and_sources_can_be_changed(listed, tmp_path):
  listed.merge.threshold = 0.0
  listed.merge.sources = ("web",)
  run(listed)
  assert captions(tmp_path / "clean.json") == [
    "A red circle.",
    "click to enlarge",
    "click to enlarge",
    "A red circle.",
  ]
  listed.merge.threshold = 0.95
  with pytest.raises(ValueError, match="no text is kept"):
    run(listed)
  # The output of an earlier merge stays.
  assert len(captions(tmp_path / "clean.json")) == 4
  assert not [*tmp_path.glob(".*")]


def test_each_source_may_have_its_own_output(listed, tmp_path):
  human = tmp_path / "human.jsonl"
  lines = (
    {"image": "4.png", "caption": ["one", "two", "..."]},
    {"image": "4.png", "caption": None},
  )
  human.write_text("".join(json.dumps(line) + "\n" for line in lines))
  listed.merge.by_source = True
  listed.merge.human = (str(human),)
  listed.merge.out = str(tmp_path / "clean.jsonl")
  stats = run(listed)
  assert (stats["human/in"], stats["human/kept"]) == (4, 2)
  assert stats["human/empty_caption"] == 2
  assert captions(tmp_path / "clean.human.jsonl") == ["one", "two"]
  assert len(captions(tmp_path / "clean.web.jsonl")) == 2
  assert len(captions(tmp_path / "clean.synthetic.jsonl")) == 4


def test_a_missing_image_does_not_affect_others(listed, tmp_path):
  (tmp_path / "images" / "0.png").unlink()
  listed.merge.out = str(tmp_path / "clean")
  stats = run(listed)
  assert stats["web/missing"] == 1
  assert stats["web/kept"] == 1
  assert stats["synthetic/kept"] == 3
  assert len(captions(tmp_path / "clean" / "*.tar")) == 4


def test_shards_are_merged_into_shards(tmp_path):
  shard = jobs.write_tar(tmp_path / "0.tar", jobs.scene_members(0, 2))
  config = defaults.capfilt().lock()
  config.update(source=(str(shard),), out=str(tmp_path / "out"))
  config.merge.out = str(tmp_path / "clean")
  texts = {"0": [IMAGE_TEXTS, IMAGE_TEXTS[:1]]}
  jobs.write_capfilt_job(config.out, config, texts)
  run(config)
  source = datasets.open_source(str(tmp_path / "clean" / "*.tar"))
  assert [source[n]["caption"].decode() for n in range(len(source))] == [
    "A red circle.",
    "a red circle left of a blue star",
    "A red circle.",
  ]
  images = [jobs.png(jobs.NOISY_SCENES[n]["image"]) for n in (0, 0, 1)]
  assert [source[n]["image"] for n in range(len(source))] == images
  # A list has no image files to refer to.
  config.merge.out = str(tmp_path / "clean.json")
  with pytest.raises(ValueError, match="is not a file of its own"):
    run(config)


def test_a_job_that_is_not_finished_is_not_merged(listed, tmp_path):
  (tmp_path / "out" / "web.json-00001.done.json").unlink()
  with pytest.raises(ValueError, match="1 of 3 work units are not done"):
    run(listed)


def test_several_jobs_are_merged(listed, tmp_path):
  other = defaults.capfilt().lock()
  other.update(source=listed.source, image_root=listed.image_root)
  texts = {"web.json-00000": [[("web", 0.7, "another")]] + [()] * 4}
  jobs.write_capfilt_job(tmp_path / "other", other, texts)
  listed.merge.jobs = (str(tmp_path / "other"),)
  run(listed)
  assert captions(tmp_path / "clean.json")[-1] == "another"


@pytest.mark.parametrize("out", ["clean.json", "clean.jsonl", "clean"])
def test_an_earlier_merge_is_replaced_and_nothing_else(listed, tmp_path, out):
  path = tmp_path / "sets" / out
  listed.merge.out = str(path)
  pattern = path if path.suffix else path / "*.tar"
  run(listed)
  assert len(captions(pattern)) == 6
  listed.merge.sources = ("web",)
  run(listed)
  assert len(captions(pattern)) == 2
  stats = path.with_name(f"{out}.stats.json")
  assert {*path.parent.iterdir()} == {path, stats}
  stats.unlink()
  with pytest.raises(ValueError, match="already exists, and is not the output"):
    run(listed)
  assert len(captions(pattern)) == 2


def test_a_folder_with_other_files_is_not_replaced(listed, tmp_path):
  listed.merge.out = str(tmp_path / "clean")
  run(listed)
  (tmp_path / "clean" / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match="already exists, and is not the output"):
    run(listed)
  assert (tmp_path / "clean" / "notes.txt").read_text() == "mine"
