"""From the rows of a job to a training set."""

import json
import os

import pytest

from blip_jax import defaults
from blip_jax.capfilt import job, merge, report, rules
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


def write_job(folder, source, image_root, texts):
  """A finished job whose images all have the same texts."""
  config = defaults.capfilt().lock()
  config.update(source=(str(source),), image_root=image_root, out=str(folder))
  config.web_texts = os.path.isfile(source)
  name = next(iter(job.find_work_units(config))).name
  number = len(datasets.open_images(str(source), image_root))
  jobs.write_capfilt_job(folder, config, {name: [texts] * number})
  return config


def images_and_captions(path, image_root):
  source = datasets.open_source(str(path), str(image_root))
  return [
    (os.path.realpath(source[n]["image"]), source[n]["caption"])
    for n in range(len(source))
  ]


@pytest.mark.parametrize("image_root", ["", "a", "b", "./a/", "ABSOLUTE", "."])
def test_a_name_stands_for_one_image_whatever_the_roots_of_the_jobs(
  tmp_path, monkeypatch, image_root
):
  monkeypatch.chdir(tmp_path)
  expected = []
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    path = tmp_path / name / "0.png"
    path.write_bytes(jobs.png(jobs.NOISY_SCENES[0]["image"]))
    rows = [{"image": "0.png", "caption": "x"}]
    (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    texts = [("web", 0.9, f"of {name}")]
    config = write_job(tmp_path / f"job_{name}", f"{name}.json", name, texts)
    expected.append((str(path), f"of {name}"))
  root = str(tmp_path / "a") if image_root == "ABSOLUTE" else image_root
  config.update(image_root=root, out="job_a")
  config.merge.update(jobs=("job_b",), out="clean.json")
  run(config)
  assert images_and_captions("clean.json", root) == expected


@pytest.mark.parametrize("image_root", ["", "images", "."])
def test_the_images_of_a_folder_are_relative_to_the_root_of_the_merge(
  tmp_path, monkeypatch, image_root
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "images").mkdir()
  path = tmp_path / "images" / "0.png"
  path.write_bytes(jobs.png(jobs.NOISY_SCENES[0]["image"]))
  config = write_job("job", "images", "", [("synthetic", 0.9, "a text")])
  config.image_root = image_root
  config.merge.out = "clean.json"
  run(config)
  found = images_and_captions("clean.json", image_root)
  assert found == [(str(path), "a text")]


def test_human_captions_and_labelled_texts_have_one_root(listed, tmp_path):
  root = listed.image_root
  human = tmp_path / "human.json"
  human.write_text(json.dumps([{"image": "4.png", "caption": "by a human"}]))
  listed.image_root = ""  # that of the job
  listed.merge.human = (str(human),)
  run(listed)
  found = images_and_captions(tmp_path / "clean.json", root)
  assert found[0] == (f"{root}/0.png", "A red circle.")
  assert found[-1] == (f"{root}/4.png", "by a human")


def test_a_job_without_any_text_says_so(tmp_path):
  (tmp_path / "images").mkdir()
  (tmp_path / "images" / "0.png").write_bytes(b"no image")
  config = write_job(tmp_path / "job", tmp_path / "images", "", [])
  with pytest.raises(ValueError, match=r"the jobs have no texts") as error:
    run(config)
  assert "threshold" not in str(error.value)


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


def test_rows_with_a_flipped_bit_are_not_merged(listed, tmp_path):
  jobs.flip(tmp_path / "out" / "web.json-00001.parquet")
  with pytest.raises(ValueError, match="1 of 3 work units are not") as error:
    run(listed)
  assert "web.json-00001.parquet: damaged: " in str(error.value)
  assert "config.job=capfilt" in str(error.value)
  assert not (tmp_path / "clean.json").exists()


def test_rows_that_are_damaged_during_a_merge_are_not_merged(
  listed, tmp_path, monkeypatch
):
  reasons = rules.Selection.reasons
  paths = [tmp_path / "out" / "web.json-00001.parquet"]

  def flip_next(*args):
    if paths:
      jobs.flip(paths.pop())
    return reasons(*args)

  monkeypatch.setattr(rules.Selection, "reasons", flip_next)
  with pytest.raises(ValueError, match=r"web.json-00001.parquet: damaged"):
    run(listed)
  assert not (tmp_path / "clean.json").exists()


@pytest.fixture
def two_shards(tmp_path):
  """A finished job over two shards of equal size and times."""
  for n in range(2):
    members = [(name, image) for name, image in jobs.scene_members(n, 1)]
    padded = [("0.png", members[0][1].ljust(4_000, b"\0"))]
    os.utime(jobs.write_tar(tmp_path / f"{n}.tar", padded), (100, 100))
  config = defaults.capfilt().lock()
  config.update(source=(str(tmp_path / "*.tar"),), out=str(tmp_path / "out"))
  config.merge.out = str(tmp_path / "clean")
  texts = {str(n): [[("synthetic", 0.9, f"of {n}")]] for n in range(2)}
  jobs.write_capfilt_job(config.out, config, texts)
  return config


def test_shards_that_were_swapped_are_not_merged(two_shards, tmp_path):
  jobs.swap(tmp_path / "0.tar", tmp_path / "1.tar")
  with pytest.raises(ValueError, match=r"2 of 2 .*changed since.*\['0', '1'\]"):
    run(two_shards)
  with pytest.raises(ValueError, match="no work unit is done"):
    report.report(two_shards, two_shards.out)
  jobs.swap(tmp_path / "0.tar", tmp_path / "1.tar")
  assert run(two_shards)["synthetic/kept"] == 2


def test_shards_that_are_swapped_during_a_merge_are_not_merged(
  two_shards, tmp_path, monkeypatch
):
  reasons = rules.Selection.reasons

  def swap(*args):
    jobs.swap(tmp_path / "0.tar", tmp_path / "1.tar")
    return reasons(*args)

  monkeypatch.setattr(rules.Selection, "reasons", swap)
  with pytest.raises(ValueError, match="changed since"):
    run(two_shards)
  assert not (tmp_path / "clean").exists()


def test_a_folder_in_the_place_of_the_statistics_is_refused(listed, tmp_path):
  (tmp_path / "clean.json.stats.json").mkdir()
  with pytest.raises(ValueError, match=r"stats\.json: expected a file"):
    run(listed)
  assert not (tmp_path / "clean.json").exists()


def test_images_of_a_folder_that_are_other_ones_now_are_not_merged(tmp_path):
  (folder := tmp_path / "images").mkdir()
  images = [jobs.png(jobs.NOISY_SCENES[n]["image"]) for n in range(3)]
  for name, image in zip("abc", images, strict=True):
    (folder / f"{name}.png").write_bytes(image)
  config = write_job(tmp_path / "job", folder, "", [("synthetic", 0.9, "x")])
  config.merge.out = str(tmp_path / "clean")
  assert run(config)["synthetic/kept"] == 3
  (folder / "b.png").rename(folder / "d.png")
  counts = {"synthetic/in": 3, "synthetic/kept": 1, "synthetic/changed": 2}
  assert run(config) == counts
  source = datasets.open_source(str(tmp_path / "clean" / "*.tar"))
  assert [source[n]["image"] for n in range(len(source))] == images[:1]
