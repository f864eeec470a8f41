"""The job: what it writes, exactly once, whatever happens to its processes."""

import dataclasses
import errno
import gc
import hashlib
import html
import io
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import random
import sys
import tarfile
import time

import jax
import numpy as np
import PIL.Image
import psutil
import pytest

from blip_jax.capfilt import (
  audit,
  job,
  label,
  ledger,
  loop,
  merge,
  progress,
  report,
  rows,
  work_units,
)
from blip_jax.capfilt.engines import local
from blip_jax.data import datasets, tokenizer
from blip_jax.inference import loading
from blip_jax.inference import model as model_lib
from blip_jax.models import families
from blip_jax.runtime import files, sharding
from tests import QUICK_TO_COMPILE, helpers, jobs
from tests.hostile import tars
from tests.jobs import NOISY_SCENES, capfilt_config


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
  monkeypatch.setattr(loading, "load", jobs.load_tiny)


@pytest.fixture
def shards(tmp_path):
  return jobs.write_scene_shards(tmp_path / "shards")


def run(config):
  return job.run(config, config.out)


def content(folder):
  """Name -> bytes of all files that must be equal for equal settings."""
  return {
    path.name: path.read_bytes()
    for path in sorted(pathlib.Path(folder).iterdir())
    if path.suffix in (".json", ".parquet")
  }


def test_every_text_has_a_row_and_everything_is_counted(shards, tmp_path):
  results = run(capfilt_config(shards / "*.tar", tmp_path / "out"))
  assert results["work_units"] == results["work_units_done"] == 3
  assert results["images/in"] == 15
  assert results["images/bad"] == 1
  assert results["web/in"] == 14  # the text of the broken image is not read
  assert results["web/bad"] == 2
  assert results["synthetic/in"] == 14
  for kind in ("images", "web", "synthetic"):
    parts = [results[f"{kind}/{name}"] for name in ("kept", "dropped", "bad")]
    assert results[f"{kind}/in"] == sum(parts)

  table = rows.read(tmp_path / "out" / "00001.parquet")
  web, synthetic = (row for row in table if row["key"] == "00001.tar:0007")
  assert (web["source"], synthetic["source"]) == ("web", "synthetic")
  assert web["text"] == NOISY_SCENES[7]["caption"]
  assert web["log_prob"] is None
  assert synthetic["log_prob"] < 0
  for row in (web, synthetic):
    assert 0 <= row["itm_prob"] <= 1
    assert row["kept"] == (row["itm_prob"] >= 0.5)
    assert row["seed"] == 0
    assert len(row["filter"]) == 16
  reasons = {row["key"]: row["reason"] for row in table if not row["itm_prob"]}
  assert reasons == {
    "00001.tar:0008": "missing_caption",
    "00001.tar:0009": "empty_caption",
  }
  done = json.loads((tmp_path / "out" / "00001.done.json").read_text())
  assert done["work_unit"] == "00001"
  assert done["images"]["in"] == 5
  assert done["input"]["bytes"] == (shards / "00001.tar").stat().st_size
  assert done["filter"] == web["filter"]
  ((key, reason),) = done["bad"].items()
  assert key == "00001.tar:0006"
  assert reason.startswith("not_an_image: ")


def test_each_process_logs_its_work_units(shards, tmp_path):
  run(capfilt_config(shards / "*.tar", tmp_path / "out"))
  (path,) = (tmp_path / "out" / "log").iterdir()
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [line["work_unit"] for line in lines] == ["00000", "00001", "00002"]
  assert [line["images"] for line in lines] == [5, 5, 5]
  assert all(line["seconds"] > 0 for line in lines)
  assert all(line["images_per_core"] > 0 for line in lines)


def test_scores_and_captions_are_those_of_the_models(shards, tmp_path):
  run(capfilt_config(shards / "*.tar", tmp_path / "out", seed=3))
  table = rows.read(tmp_path / "out" / "00000.parquet")
  mesh = sharding.make_mesh(dict(data=-1, fsdp=1, tensor=1))
  filter_model = jobs.load_tiny("one", "itm", mesh)
  captioner = jobs.load_tiny("one", "caption", mesh)
  images = [NOISY_SCENES[n]["image"] for n in range(5)]
  for row in table:
    match = filter_model.match(images[row["row"]], row["text"])
    np.testing.assert_allclose(row["itm_prob"], match.itm_prob[0, 0], rtol=1e-4)
    np.testing.assert_allclose(
      row["itc_cosine"], match.itc_cosine[0, 0], atol=1e-5
    )
  generate = captioner.captioner(
    sample=True, top_p=0.9, num_return_sequences=1, max_length=8, min_length=4
  )
  keys = [f"00000.tar:{n:04d}".encode() for n in range(5)]
  seeds = [
    int.from_bytes(hashlib.sha256(key).digest()[:4], "little") for key in keys
  ]
  pixels = np.stack([*map(captioner.image, images)] + 3 * [images[0]])
  captions = generate(pixels, 3, [*seeds, 0, 0, 0])
  synthetic = [row["text"] for row in table if row["source"] == "synthetic"]
  assert synthetic == [caption.text for caption in captions[:5]]


def test_without_a_captioner_and_without_web_texts(shards, tmp_path):
  results = run(capfilt_config(shards / "*.tar", tmp_path / "a", captioner=""))
  assert results["web/in"] == 14
  assert results["synthetic/in"] == 0
  results = run(
    capfilt_config(shards / "*.tar", tmp_path / "b", web_texts=False)
  )
  assert results["web/in"] == 0
  assert results["synthetic/in"] == 14


def test_a_list_of_images_with_several_texts(tmp_path):
  lines = []
  for n in range(5):
    path = tmp_path / f"{n}.png"
    path.write_bytes(jobs.png(NOISY_SCENES[n]["image"]))
    texts = [NOISY_SCENES[n]["caption"], "a red circle"]
    lines.append({"image": path.name, "caption": texts, "image_id": n})
  (tmp_path / "web.json").write_text(json.dumps(lines))
  config = capfilt_config(
    tmp_path / "web.json", tmp_path / "out", work_unit_rows=2
  )
  config.image_root = str(tmp_path)
  results = run(config)
  assert results["work_units"] == 3
  assert results["web/in"] == 10
  table = rows.read(tmp_path / "out" / "web.json-00002.parquet")
  assert {row["key"] for row in table} == {"web.json:4"}
  assert {row["image"] for row in table} == {str(tmp_path / "4.png")}
  assert {row["image_id"] for row in table} == {"4"}


def test_a_job_resumes_with_what_is_not_done(shards, tmp_path):
  config = capfilt_config(shards / "*.tar", tmp_path / "out")
  run(config)
  before = content(config.out)
  times = {
    path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.par*")
  }
  (tmp_path / "out" / "00001.done.json").unlink()
  (tmp_path / "out" / "00001.parquet").write_bytes(b"half")
  run(config)
  assert content(config.out) == before
  repeated = [
    path.name for path, time in times.items() if path.stat().st_mtime_ns != time
  ]
  assert repeated == ["00001.parquet"]


def test_another_seed_gives_other_captions(shards, tmp_path):
  captions = []
  for seed in (0, 1):
    run(capfilt_config(shards / "*.tar", tmp_path / str(seed), seed=seed))
    table = rows.read(tmp_path / str(seed) / "00000.parquet")
    captions.append([r["text"] for r in table if r["source"] == "synthetic"])
  assert captions[0] != captions[1]


@pytest.mark.parametrize("threshold", [math.nan, -0.1, 1.1])
def test_a_threshold_that_no_probability_can_have(shards, tmp_path, threshold):
  config = capfilt_config(shards / "*.tar", tmp_path / "out")
  config.threshold = threshold
  with pytest.raises(ValueError, match=r"config\.threshold: expected 0 to 1"):
    run(config)


def test_other_settings_are_refused_unless_forced(shards, tmp_path):
  config = capfilt_config(shards / "*.tar", tmp_path / "out")
  run(config)
  before = content(config.out)
  other = capfilt_config(shards / "*.tar", tmp_path / "out", filter="other")
  with pytest.raises(ValueError, match=r"filter: .* there, .* now"):
    run(other)
  assert content(config.out) == before
  other.force = True
  run(other)
  after = content(config.out)
  assert all(before[name] != after[name] for name in before)
  with pytest.raises(ValueError, match=r"config\.force"):
    run(config)


def shown(model, **changes):
  """A model with another card, prompt or vocabulary, and the same weights."""
  card = dataclasses.replace(model.card, **changes)
  return dataclasses.replace(model, card=card)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(dtype="bfloat16"), "dtype: 'float32' there, 'bfloat16' now"),
    (dict(prompt="a photo of"), "prompt: 'a picture of ' there, 'a photo of'"),
    (dict(threshold=0.4), "threshold: 0.5 there, 0.4 now"),
    (dict(seed=1), "seed: 0 there, 1 now"),
    (dict(per_device_batch_size=2), "batch_size: 8 there, 16 now"),
    (dict(mesh=dict(data=4, fsdp=2, tensor=1)), "mesh: .*'data': 4"),
    (dict(web_texts=False), "web_texts: True there, False now"),
    (dict(captioner=""), "captioner: .* there, None now"),
    (dict(scaled_jpeg=True), "scaled_jpeg: None there, True now"),
  ],
)
def test_whatever_changes_the_rows_is_refused(
  shards, tmp_path, change, message
):
  config = capfilt_config(shards / "00000.tar", tmp_path / "out")
  run(config)
  with config.unlocked():
    config.update(change)
  with pytest.raises(ValueError, match=f"\n  {message}") as error:
    run(config)
  if config.captioner:
    assert str(error.value).count(" there, ") == 1


def test_another_generation_default_or_vocabulary_of_a_model_is_refused(
  shards, tmp_path, monkeypatch
):
  config = capfilt_config(shards / "00000.tar", tmp_path / "out")
  run(config)
  with monkeypatch.context() as context:
    context.setattr(
      loading,
      "load",
      lambda *args, **kwargs: shown(
        jobs.load_tiny(*args, **kwargs),
        generation={"num_beams": 3, "no_repeat_ngram_size": 2},
      ),
    )
    with pytest.raises(ValueError, match=r"generation: .*ngram_size.* now"):
      run(config)
  folder = tmp_path / "vocabulary"
  helpers.scenes_tokenizer().save(folder)
  lines = (folder / "vocab.txt").read_text().splitlines()
  lines[-1], lines[-2] = lines[-2:]
  (folder / "vocab.txt").write_text("\n".join(lines) + "\n")
  other = tokenizer.Tokenizer.load(folder)
  monkeypatch.setattr(
    loading,
    "load",
    lambda *args, **kwargs: dataclasses.replace(
      jobs.load_tiny(*args, **kwargs), tokenizer=other
    ),
  )
  with pytest.raises(ValueError, match=r"vocabularies: .* there, .* now"):
    run(config)


def test_what_does_not_change_the_rows_is_accepted(shards, tmp_path, caplog):
  # Other tests may have started servers that stay, such as `multiprocessing`'s.
  children = psutil.Process().children()
  config = capfilt_config(shards / "00000.tar", tmp_path / "out")
  run(config)
  before = content(config.out)
  done = tmp_path / "out" / "00000.done.json"
  made_by_another = json.loads(done.read_text())
  made_by_another["made_with"]["jax"] = "0.1"
  done.write_text(json.dumps(made_by_another))
  config.update(
    num_threads=3,
    num_workers=2,
    lease_seconds=10.0,
    dtype="float32",
    prompt="a picture of ",
  )
  run(config)
  assert "jax 0.1 there, " in caplog.text
  done.unlink()
  run(config)
  assert content(config.out) == before
  assert set(psutil.Process().children()) <= set(children)


def test_a_new_shard_joins_and_a_changed_one_is_done_again(shards, tmp_path):
  config = capfilt_config(shards / "*.tar", tmp_path / "out")
  run(config)
  jobs.write_tar(shards / "00003.tar", jobs.scene_members(20, 5))
  # Of the same size.
  jobs.write_tar(shards / "00000.tar", jobs.scene_members(30, 4))
  results = run(config)
  assert results["images/in"] == 19
  table = rows.read(tmp_path / "out" / "00000.parquet")
  assert table[0]["text"] == NOISY_SCENES[30]["caption"]


@pytest.mark.parametrize("ending", ["parquet", "done.json"])
def test_a_folder_in_the_place_of_an_output_costs_its_work_unit(
  shards, tmp_path, ending
):
  out = tmp_path / "out"
  config = capfilt_config(shards / "*.tar", out, captioner="")
  run(config)
  (out / "00001.done.json").unlink()
  jobs.replace_by(out / f"00000.{ending}", "folder")
  with pytest.raises(ValueError, match="1 work units could not be") as error:
    run(config)
  assert f"00000.{ending}: expected a file" in str(error.value)
  assert (out / "00001.done.json").exists()
  (out / f"00000.{ending}").rmdir()
  assert run(config)["images/in"] == 15


def test_a_damaged_shard_does_not_affect_others(shards, tmp_path):
  intact = (shards / "00002.tar").read_bytes()
  (shards / "00002.tar").write_bytes(intact[: len(intact) // 2 - 700])
  (shards / "00003.tar").write_bytes(b"not a tar")
  results = run(capfilt_config(shards / "*.tar", tmp_path / "out"))
  assert results["work_units_done"] == 4
  assert 10 < results["images/in"] < 15
  for name in ("00002", "00003"):
    done = json.loads((tmp_path / "out" / f"{name}.done.json").read_text())
    assert done["damage"]


def change_while_labelling(monkeypatch, name, changes):
  """Calls each of `changes` once while a work unit is labelled."""
  to_parquet, finish = rows.to_parquet, loop.finish
  current, left = [], list(changes)

  def finished(unit, *args):
    current[:] = [unit.work_unit.name]
    finish(unit, *args)

  def changed(table):
    if current == [name] and left:
      left.pop(0)()
    return to_parquet(table)

  monkeypatch.setattr(loop, "finish", finished)
  monkeypatch.setattr(rows, "to_parquet", changed)


def write_reversed(shards, name):
  """Overwrites a shard by one of the same size, with its texts reversed."""
  path = shards / f"{name}.tar"
  size = path.stat().st_size
  with tarfile.open(path) as tar:
    members = [(m.name, tar.extractfile(m).read()) for m in tar]
  members = [(n, c[::-1] if n.endswith("txt") else c) for n, c in members]
  jobs.write_tar(path, members)
  assert path.stat().st_size == size


def test_a_shard_that_is_overwritten_while_it_is_labelled_is_done_again(
  shards, tmp_path, monkeypatch, caplog
):
  times = os.stat(shards / "00001.tar")

  def overwrite():
    write_reversed(shards, "00001")
    os.utime(shards / "00001.tar", ns=(times.st_atime_ns, times.st_mtime_ns))

  change_while_labelling(monkeypatch, "00001", [overwrite])
  out = tmp_path / "out"
  assert run(capfilt_config(shards / "*.tar", out))["work_units_done"] == 3
  assert "00001 is not done: " in caplog.text
  assert "00001.tar: changed while it was labelled" in caplog.text
  assert run(capfilt_config(shards / "*.tar", tmp_path / "b"))
  assert content(out) == content(tmp_path / "b")


def test_a_shard_that_keeps_changing_is_refused_after_all_others(
  shards, tmp_path, monkeypatch
):
  overwrite = lambda: write_reversed(shards, "00000")
  change_while_labelling(monkeypatch, "00000", [overwrite] * 10)
  with pytest.raises(ValueError, match=r"00000\.tar: changed while") as error:
    run(capfilt_config(shards / "*.tar", tmp_path / "out"))
  assert "1 work units could not be done in 3 tries" in str(error.value)
  names = {path.name for path in (tmp_path / "out").glob("*.done.json")}
  assert names == {"00001.done.json", "00002.done.json"}


def test_a_shard_that_cannot_be_read_for_now_is_done_at_the_next_start(
  shards, tmp_path, monkeypatch
):
  config = capfilt_config(shards / "*.tar", tmp_path / "out")
  sha256 = files.sha256

  def fail(path):
    if str(path).endswith("00000.tar"):
      raise OSError(errno.EIO, "Input/output error")
    return sha256(path)

  with monkeypatch.context() as patch:
    patch.setattr(files, "sha256", fail)
    with pytest.raises(ValueError, match=r"00000\.tar: .*Input/output error"):
      run(config)
  names = {path.name for path in (tmp_path / "out").glob("*.done.json")}
  assert names == {"00001.done.json", "00002.done.json"}
  assert run(config)["images/in"] == 15


def test_hostile_shards_do_not_affect_others(shards, tmp_path):
  cases = [*tars.cases()][::150]
  for number, case in enumerate(cases):
    (shards / f"hostile{number}.tar").write_bytes(case.content)
  results = run(capfilt_config(shards / "*.tar", tmp_path / "out"))
  assert results["work_units_done"] == 3 + len(cases)
  assert results["images/in"] >= 15 + 10 * len(cases)
  before = {path.name for path in (tmp_path / "out").glob("0*.parquet")}
  assert before == {"00000.parquet", "00001.parquet", "00002.parquet"}


def test_more_texts_of_an_image_than_are_scored_are_counted(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(label, "MAX_TEXTS", 5)
  (tmp_path / "a.png").write_bytes(jobs.png(NOISY_SCENES[0]["image"]))
  captions = [f"a red circle {n}" for n in range(8)]
  path = tmp_path / "web.json"
  path.write_text(json.dumps([{"image": "a.png", "caption": captions}]))
  config = capfilt_config(path, tmp_path / "out", image_root=str(tmp_path))
  results = run(config)
  assert (results["web/in"], results["web/bad"]) == (8, 3)
  table = rows.read(tmp_path / "out" / "web.json-00000.parquet")
  reasons = [row["reason"] for row in table if row["itm_prob"] is None]
  assert reasons == ["too_many"] * 3


def label_and_merge(source, tmp_path, out, **changes):
  """Runs a job that keeps all web texts, and what follows it.

  Returns the ids of its images, and the records of `out`.
  """
  config = capfilt_config(source, tmp_path / "out", **changes)
  config.merge.update(threshold=0.0, sources=("web",), out=str(tmp_path / out))
  assert run(config)["images/bad"] == 0
  audit.verify(config, config.out)
  report.report(config, config.out)
  page = (tmp_path / "out" / "report.html").read_text()
  keys = {
    row["key"]
    for path in (tmp_path / "out").glob("*.parquet")
    for row in rows.read(path)
  }
  assert all(html.escape(key) in page for key in keys)
  merge.merge(config, config.out)
  kept = config.merge.out + ("" if "." in out else "/*.tar")
  return {files.named(key) for key in keys}, [*datasets.open_source(kept)]


def test_any_names_of_files_are_labelled_and_merged(tmp_path):
  folder = helpers.write_hard_names(tmp_path / os.fsdecode(b"im\xe9ges"))
  ids, merged = label_and_merge(
    *(folder, tmp_path, "clean.jsonl"), image_root=str(folder), work_unit_rows=2
  )
  assert ids == {f"{name}.png" for name in helpers.HARD_NAMES}
  assert {record["image"] for record in merged} == ids
  for record in merged:
    text = (folder / record["image"]).with_suffix(".txt").read_text()
    assert text == record["caption"]


def test_any_names_of_members_are_labelled_and_merged(tmp_path):
  folder = helpers.write_hard_names(tmp_path / "images")
  shard = tmp_path / (os.fsdecode(b"\xe9") * 251 + ".tar")
  with tarfile.open(shard, "w") as tar:
    for name in sorted(os.listdir(folder)):
      tar.add(folder / name, name)
  ids, merged = label_and_merge(shard, tmp_path, "clean")
  assert ids == {f"{shard.name}:{name}" for name in helpers.HARD_NAMES}
  assert {record["caption"].decode() for record in merged} == {
    f"a grey square {n}" for n in range(len(ids))
  }


def test_hostile_members_do_no_harm(tmp_path):
  folder = tmp_path / "shards"
  folder.mkdir()
  path = folder / "0.tar"
  bomb = io.BytesIO()
  PIL.Image.new("1", (30_000, 30_000)).save(bomb, "png")
  members = dict(jobs.scene_members(0, 2)) | {
    "../../escape.png": jobs.png(NOISY_SCENES[0]["image"]),
    "/absolute.png": jobs.png(NOISY_SCENES[1]["image"]),
    "evil.pkl": b"cos\nsystem\n(S'touch evil'\ntR.",
    "bomb.png": bomb.getvalue(),
    "bomb.txt": b"a red circle",
  }
  with tarfile.open(path, "w") as tar:
    for name, raw in members.items():
      member = tarfile.TarInfo(name)
      member.size = len(raw)
      tar.addfile(member, io.BytesIO(raw))
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    tar.addfile(link)
  before = {*tmp_path.rglob("*")}
  run(capfilt_config(path, tmp_path / "out"))
  new = {*tmp_path.rglob("*")} - before
  assert all(tmp_path / "out" in (p, *p.parents) for p in new)
  done = json.loads((tmp_path / "out" / "0.done.json").read_text())
  assert {key: why.partition(":")[0] for key, why in done["bad"].items()} == {
    "0.tar:bomb": "too_large"
  }


def test_unusable_texts_are_counted(tmp_path):
  images = [jobs.png(NOISY_SCENES[n]["image"]) for n in range(3)]
  path = jobs.write_tar(
    tmp_path / "0.tar",
    [
      ("a.png", images[0]),
      ("a.txt", b"red " * 100_000),
      ("b.png", images[1]),
      ("b.txt", b"\xff\xfe broken"),
      ("c.png", images[2]),
      ("c.txt", b"<b>a red circle</b>"),
    ],
  )
  results = run(capfilt_config(path, tmp_path / "out"))
  assert results["web/bad"] == 2
  table = rows.read(tmp_path / "out" / "0.parquet")
  assert [row["reason"] for row in table if row["itm_prob"] is None] == [
    "too_long",
    "invalid_utf8",
  ]
  assert max(len(row["text"]) for row in table) <= 200


def test_a_source_without_a_usable_image_is_an_error(tmp_path):
  path = jobs.write_tar(tmp_path / "0.tar", [("a.png", b"no"), ("a.txt", b"a")])
  with pytest.raises(ValueError, match=r"no image can be used; 0\.tar:a"):
    run(capfilt_config(path, tmp_path / "out"))


def test_a_missing_extra_is_reported_before_any_work(
  shards, tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(ValueError, match=r"pip install 'blip_jax\[parquet\]'"):
    run(capfilt_config(shards / "*.tar", tmp_path / "out"))
  assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_what_is_finished(shards, tmp_path, monkeypatch):
  config = capfilt_config(shards / "*.tar", tmp_path / "out")
  fsync, num_synced = os.fsync, 0

  def fsync_until_full(handle):
    nonlocal num_synced
    num_synced += 1
    if num_synced == 5:  # the job, two files of a work unit, one of the next
      raise OSError(errno.ENOSPC, "No space left on device")
    fsync(handle)

  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", fsync_until_full)
    with pytest.raises(OSError, match="No space left"):
      run(config)
  names = sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_file())
  assert "00000.done.json" in names
  assert "00001.done.json" not in names
  assert not [name for name in names if name.startswith(".")]
  run(config)
  assert audit.verify(config, config.out) == {"work_units": 3, "images": 15}


def run_in_process(source, out, models, seconds):
  """Runs a job with models from a file: to make them would take longer.

  Args:
    seconds: that each work unit takes longer, so that it can be killed.
  """
  models = pickle.loads(models.read_bytes())

  def load(name, task, mesh, **_):
    card, params = models[task]
    params = jax.device_put(params, sharding.replicated(mesh))
    module = families.build(task, card.config)
    return model_lib.Model(
      card, module, params, helpers.scenes_tokenizer(), mesh
    )

  def slow_to_parquet(table, to_parquet=rows.to_parquet):
    time.sleep(seconds)
    return to_parquet(table)

  loading.load, rows.to_parquet = load, slow_to_parquet
  run(capfilt_config(source, out, per_device_batch_size=4, lease_seconds=20.0))


def test_killed_processes_do_not_change_the_result(tmp_path, monkeypatch):
  """Three processes label twelve shards. Five times, one that has a lease is
  killed and replaced. The result is that of a single process."""
  folder = tmp_path / "shards"
  folder.mkdir()
  for shard in range(12):
    jobs.write_tar(
      folder / f"{shard:05d}.tar", jobs.scene_members(8 * shard, 8)
    )
  monkeypatch.setenv("XLA_FLAGS", QUICK_TO_COMPILE)  # one device per process
  # Where the fork server looks for the modules that it imports in advance.
  monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(__file__).parent.parent))
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload([__name__])

  models = tmp_path / "models"
  parts = {}
  for task in ("caption", "itm"):
    model = helpers.make_model(task)
    parts[task] = model.card, jax.tree.map(np.asarray, model.params)
  models.write_bytes(pickle.dumps(parts))

  def start(out, seconds=1.0):
    args = folder / "*.tar", tmp_path / out, models, seconds
    process = context.Process(target=run_in_process, args=args, daemon=True)
    process.start()
    return process

  single = start("single", seconds=0.0)
  single.join()
  processes = [start("out") for _ in range(3)]
  rng, num_kills = random.Random(0), 0
  while any(process.is_alive() for process in processes):
    time.sleep(rng.uniform(0.0, 0.2))
    owners = " ".join(local.owners(tmp_path / "out").values())
    working = [
      p for p in processes if f"process {p.pid} " in owners and p.is_alive()
    ]
    if working and num_kills < 5:
      victim = rng.choice(working)
      victim.kill()
      victim.join()
      num_kills += 1
      processes[processes.index(victim)] = start("out")
  assert num_kills == 5
  assert [process.exitcode for process in processes] == [0, 0, 0]
  assert content(tmp_path / "out") == content(tmp_path / "single")
  assert len(content(tmp_path / "out")) == 2 * 12 + 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_collection(tmp_path, monkeypatch):
  """Over 10,000 images, after the first work units have compiled everything."""
  sizes, finish = [], loop.finish
  this_process = psutil.Process()

  def measured(*args):
    finish(*args)
    gc.collect()
    sizes.append(this_process.memory_info().rss)

  monkeypatch.setattr(loop, "finish", measured)
  source = "scenes:train?num=10000&size=16&noise=0.4"
  config = capfilt_config(source, tmp_path / "out", work_unit_rows=500)
  config.per_device_batch_size = 8
  assert run(config)["images/in"] == 10_000
  assert len(sizes) == 20
  assert max(sizes[3:]) < 1.1 * sizes[2]


def counts_of(kept, texts, images):
  counts = rows.Counts([])
  counts.texts["web"].update({"in": texts, "kept": kept})
  counts.images["in"] = images
  return counts


def test_progress_by_the_clock(tmp_path, monkeypatch):
  now = [100.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  unit = work_units.WorkUnit("a", "scenes:train?num=8")
  opened = progress.Opened(unit, 1, unit.input(), 8, rows.Counts([]))
  with progress.Progress(2, tmp_path) as shown:
    said = []
    monkeypatch.setattr(
      shown._bar, "set_postfix_str", lambda text, refresh: said.append(text)
    )
    now[0] = 103.0
    shown.show(opened)
    now[0] = 104.0
    shown.show(opened)
    shown.add(6, counts_of(3, 4, 6))
    assert shown._bar.n == pytest.approx(1.75)
    # More images than the work unit has do not overfill the bar.
    shown.add(6, counts_of(0, 0, 12))
    assert shown._bar.n == pytest.approx(2)
    now[0] = 104.5678
    shown.end(counts_of(3, 4, 12), 123.45678)
  assert said == [
    "1.5 images/s, 75% of texts kept",
    "3.0 images/s, 0% of texts kept",
  ]
  (path,) = (tmp_path / "log").iterdir()
  assert json.loads(path.read_text()) == {
    "work_unit": "a",
    "images": 12,
    "seconds": 1.568,
    "images_per_core": 123.5,
  }


def test_a_summary_counts_what_is_done(tmp_path):
  units = [work_units.WorkUnit(n, f"scenes:train?num={n}") for n in "123"]
  started = ledger.Ledger(tmp_path)
  started.begin({"a": 1}, force=False)
  for unit, number in ((units[0], 1), (units[2], 5)):
    outcomes = {"in": number, "kept": 2, "dropped": 3, "bad": 4}
    done = {
      "input": unit.fingerprint(),
      "images": outcomes,
      "texts": {"web": outcomes, "synthetic": {**outcomes, "kept": 7}},
      "bad": {},
      "damage": [],
    }
    started.finish(unit, b"rows", done)
  summary = job.summary(started, units)
  assert (summary["work_units"], summary["work_units_done"]) == (3, 2)
  for kind in ("images", "web", "synthetic"):
    found = [summary[f"{kind}/{o}"] for o in ("in", "kept", "dropped", "bad")]
    assert found == [6, 14 if kind == "synthetic" else 4, 6, 8]


def test_the_first_problem_is_damage_and_then_an_image():
  assert job._first_problem({"damage": [], "bad": {}}) == ""
  bad = {"a": "truncated: x", "b": "empty: y"}
  assert job._first_problem({"damage": [], "bad": bad}) == "a: truncated: x"
  assert job._first_problem({"damage": ["cut"], "bad": bad}) == "cut"
