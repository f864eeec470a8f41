"""Jobs whose data and output are in an object store."""

import json
import time

import numpy as np
import pytest

from blip_jax import train
from blip_jax.capfilt import job, ledger, merge
from blip_jax.capfilt.engines import local
from blip_jax.convert import hub, opening
from blip_jax.data import datasets, tokenizer
from blip_jax.inference import caption_images, index, loading
from blip_jax.runtime import (
  best,
  checkpoint,
  copies,
  files,
  lock,
  metrics,
  saved_arrays,
  snapshot,
)
from tests import helpers, jobs, short_runs


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  copies.scratch_folder.cache_clear()
  yield tmp_path / "cache"
  copies.scratch_folder.cache_clear()


@pytest.fixture
def bucket(server):
  return server.bucket()


def _config(root):
  """Captioning with a list of images, four steps, a checkpoint each."""
  config = short_runs.shrunk_config("caption_coco")
  config.data.train = (f"{root}/train.json",)
  config.data.image_root = f"{root}/images"
  config.evals.val.source = config.evals.test.source = ""  # slow to compile
  config.checkpoint.every_steps = 1
  config.num_steps = 4
  return config


def test_a_run_is_killed_and_resumed(bucket, tmp_path, monkeypatch):
  """It ends with the bits of a run on a disk that was never stopped."""
  short_runs.make_quick(monkeypatch)
  helpers.write_pairs(tmp_path)
  copies.copy_folder(tmp_path, f"{bucket}/data")
  train.train(_config(tmp_path), str(tmp_path / "run"))
  config, workdir = _config(f"{bucket}/data"), f"{bucket}/run"

  class Killed(BaseException):
    pass

  save = checkpoint.Checkpoints.save

  def killed(self, step, *args, **options):
    if step == 3:
      self.wait()
      raise Killed
    return save(self, step, *args, **options)

  monkeypatch.setattr(checkpoint.Checkpoints, "save", killed)
  with pytest.raises(Killed):
    train.train(config, workdir)
  monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
  assert files.list_folder(f"{workdir}/checkpoints") == ["1", "2"]
  # What another machine finds: nothing but the bucket.
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
  copies.scratch_folder.cache_clear()
  train.train(config, workdir)
  assert files.list_folder(f"{workdir}/checkpoints") == ["3", "4"]
  left, right = (
    saved_arrays.load_to_host(snapshot.find(run), "params")
    for run in (tmp_path / "run", workdir)
  )
  helpers.assert_same(left, right)
  rows = [*files.json_lines(f"{workdir}/metrics.jsonl")]
  assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
  assert files.list_folder(f"{workdir}/tb")
  assert not files.exists(f"{workdir}/.lock")
  opened = opening.open_checkpoint(workdir)
  assert opened.card.family == "caption"


@pytest.fixture
def run():
  return helpers.ToyRun()


def test_a_step_without_digests_is_not_there(bucket, run):
  run.save(bucket, 1)
  copies.copy_folder(f"{bucket}/checkpoints/1", f"{bucket}/checkpoints/2")
  assert snapshot.steps(f"{bucket}/checkpoints") == [1, 2]
  files.remove(f"{bucket}/checkpoints/2/digests.json")
  assert snapshot.steps(f"{bucket}/checkpoints") == [1]
  assert snapshot.find(bucket).name == "1"


def test_a_state_is_resumed_and_old_steps_go(bucket, run):
  store = checkpoint.Checkpoints(
    bucket, every_steps=1, keep=2, keep_every_steps=2
  )
  state, loader = run.make(), helpers.StubLoader(7)
  for step in range(1, 6):
    state = state.replace(step=state.step + 1)
    assert store.save(step, state, loader, helpers.TOY_CONFIG)
  store.close()
  root = f"{bucket}/checkpoints"
  assert files.list_folder(root) == ["2", "4", "5"]
  loader = helpers.StubLoader()
  resumed, said = run.start(bucket, loader)
  helpers.assert_same(resumed, state)
  assert loader.position == 7
  assert said == f"resumed {root}/5"


def test_digests_are_uploaded_last(bucket, run, server):
  server.requests.clear()
  run.save(bucket, 1)
  written = [path for method, path in server.requests if method in "PUT,POST"]
  assert len(written) > 5
  assert written[-1].endswith("/checkpoints/1/digests.json")


def test_a_damaged_step_is_passed_over(bucket, run):
  for step in (1, 2):
    run.save(bucket, step)
  path = f"{bucket}/checkpoints/2/meta/meta.json"
  files.write_text(path, files.read_text(path) + " ")
  assert snapshot.find(bucket).name == "1"
  run.save(bucket, 2)
  assert snapshot.find(bucket).name == "2"


def test_a_step_that_cannot_be_uploaded(bucket, run, server):
  store = checkpoint.Checkpoints(bucket, every_steps=1)
  refused = server.fails("403 Forbidden", times=99, method="PUT")
  store.save(1, run.make(), helpers.StubLoader(), helpers.TOY_CONFIG)
  with refused, pytest.raises(PermissionError, match="s3:PutObject"):
    store.close()
  assert snapshot.steps(f"{bucket}/checkpoints") == []


def test_the_next_step_replaces_one_that_could_not_be_uploaded(
  bucket, run, server, caplog
):
  """And the last one is tried again by itself."""
  store = checkpoint.Checkpoints(bucket, every_steps=1, max_unsaved_steps=4)
  rest = run.make(), helpers.StubLoader(), helpers.TOY_CONFIG
  store.save_now(1, *rest)
  with server.fails("403 Forbidden", times=999, method="PUT"):
    for step in (2, 3):
      store.save(step, *rest)
      store._settle()
  assert "step 3 could not be saved" in caplog.text
  assert "s3:PutObject" in caplog.text
  assert "The last checkpoint is of step 1" in caplog.text
  assert snapshot.steps(f"{bucket}/checkpoints") == [1]
  store.save_now(4, *rest)
  with server.fails("403 Forbidden", times=1, method="PUT"):
    store.save_now(5, *rest)
  store.close()
  assert snapshot.steps(f"{bucket}/checkpoints") == [4, 5]


def test_a_workdir_without_checkpoints(bucket):
  with pytest.raises(ValueError, match=f"{bucket}/run holds no checkpoint"):
    snapshot.find(f"{bucket}/run")
  assert not snapshot.holds_one(f"{bucket}/run")


def test_several_processes_need_a_shared_folder(bucket, monkeypatch):
  monkeypatch.setattr("jax.process_count", lambda: 2)
  with pytest.raises(ValueError, match=f"{bucket}: .* mount the bucket"):
    checkpoint.Checkpoints(bucket, every_steps=1)


def test_the_best_parameters(bucket, run):
  kept = best.Best(bucket, ["val/score"])
  params = run.make().params
  assert kept.update(1, params, {"val/score": 0.5})
  assert not kept.update(2, params, {"val/score": 0.4})
  assert kept.update(3, params, {"val/score": 0.6})
  assert files.list_folder(f"{bucket}/best") == ["3"]
  assert not best.Best(bucket, ["val/score"]).update(
    4, params, {"val/score": 0.6}
  )
  loaded = saved_arrays.load_to_host(snapshot.find(f"{bucket}/best"), "params")
  helpers.assert_same(loaded, params)


def test_metrics_of_a_run_that_is_resumed(bucket):
  for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
    writer = metrics.MetricWriter(bucket, first)
    for step in steps:
      writer.write(step, {"loss": first})
    writer.close()
  rows = [*files.json_lines(f"{bucket}/metrics.jsonl")]
  assert [(row["step"], row["loss"]) for row in rows] == [
    (1, 0.0),
    (2, 0.0),
    (3, 2.0),
    (4, 2.0),
  ]
  assert len(files.list_folder(f"{bucket}/tb")) == 2


def test_a_lock_keeps_others_out_and_is_taken_over(bucket):
  path = f"{bucket}/.lock"
  held = lock.Lock(path, patience=0.6)
  assert held.take()
  content = json.loads(files.read_text(path))
  assert lock.Lock(path, patience=0.6).take() is False
  # Of a process on another machine that has ended.
  held.release()
  away = content | {"machine": "0" * 8, "host": "elsewhere"}
  files.write_text(path, json.dumps(away))
  other = lock.Lock(path, patience=0.6)
  deadline = time.monotonic() + 10
  while not (taken := other.take()):
    assert taken is None and time.monotonic() < deadline
    time.sleep(0.05)
  other.check()
  files.write_text(path, json.dumps(content))
  with pytest.raises(ValueError, match="has lost its lock"):
    other.check()
  other.release()


@pytest.fixture
def tiny_models(monkeypatch):
  monkeypatch.setattr(loading, "load", jobs.load_tiny)


def test_capfilt_writes_the_bytes_of_a_local_job(bucket, tmp_path, tiny_models):
  shards = jobs.write_scene_shards(tmp_path / "shards")
  copies.copy_folder(shards, f"{bucket}/shards")
  outs = tmp_path / "out", f"{bucket}/out"
  for out, source in zip(outs, (shards, f"{bucket}/shards"), strict=True):
    config = jobs.capfilt_config(f"{source}/*.tar", out)
    counts = job.run(config, str(out))
    assert counts["images/in"] == 15
    config.merge.out = str(files.as_path(out) / "clean")
    config.merge.update(min_words=0, max_per_image=0)
    merge.merge(config, str(out))
  names = [name for name in files.list_folder(outs[0]) if name != "log"]
  assert [n for n in files.list_folder(outs[1]) if n != "log"] == names
  for name in names:
    if name.endswith(".parquet"):
      there, here = (files.read_bytes(files.as_path(o) / name) for o in outs)
      assert there == here
  shards = files.list_folder(outs[0] / "clean")
  assert shards == files.list_folder(f"{outs[1]}/clean") != []
  for name in shards:
    assert (outs[0] / "clean" / name).read_bytes() == files.read_bytes(
      f"{outs[1]}/clean/{name}"
    )
  # Nothing is left to do, and nothing is done again.
  config = jobs.capfilt_config(f"{bucket}/shards/*.tar", outs[1])
  before = files.stat(f"{outs[1]}/00000.parquet")
  job.run(config, str(outs[1]))
  assert files.stat(f"{outs[1]}/00000.parquet") == before


def test_a_work_unit_has_one_owner(bucket, tmp_path):
  """Of two ledgers, as of two hosts, one gets the lease."""
  shards = jobs.write_scene_shards(tmp_path / "shards")
  config = jobs.capfilt_config(f"{shards}/00000.tar", bucket)
  (unit,) = job.find_work_units(config)
  books = [ledger.Ledger(f"{bucket}/out") for _ in range(2)]
  for book in books:
    book.begin({"x": 1}, force=False)
  first, second = (local.Leased([unit], book, 5.0) for book in books)
  assert first._take(unit) and not second._take(unit)
  books[0].finish(unit, b"rows", {"input": unit.input().as_json()})
  first.end(unit)
  assert files.read_bytes(f"{bucket}/out/00000.parquet") == b"rows"
  assert second._take(unit)
  second.end(unit)


def test_captions_are_the_lines_of_a_local_job(bucket, tmp_path, monkeypatch):
  helpers.write_captioner(tmp_path / "model")
  helpers.write_gallery(tmp_path / "images")
  copies.copy_folder(tmp_path / "images", f"{bucket}/images")
  config = short_runs.load_config("caption_images")
  config.update(model=str(tmp_path / "model"), images=str(tmp_path / "images"))
  config.batch_size = 2
  caption_images.caption_images(config, str(tmp_path / "run"))
  copies.copy_folder(tmp_path / "model", f"{bucket}/model")
  config.update(images=f"{bucket}/images", model=f"{bucket}/model")
  caption_images.caption_images(config, f"{bucket}/run")
  there, here = (
    files.read_text(f"{workdir}/captions.jsonl")
    for workdir in (tmp_path / "run", f"{bucket}/run")
  )
  assert here == there
  assert files.list_folder(f"{bucket}/run") == [
    "captions.jsonl",
    "captions.jsonl.job.json",
  ]


@pytest.mark.slow  # a model is compiled
def test_an_index_is_built_and_used_again(bucket, tmp_path, server):
  helpers.write_gallery(tmp_path / "images")
  copies.copy_folder(tmp_path / "images", f"{bucket}/images")
  model = helpers.make_model("itm")
  build = lambda folder, images: index.build(
    folder, model, datasets.open_images(str(images)), 4
  )
  there = build(tmp_path / "index", tmp_path / "images")
  here = build(f"{bucket}/index", f"{bucket}/images")
  assert here.ids == there.ids and here.unreadable.keys() == {"broken.png"}
  query = model.embed_texts(["a red circle"])
  np.testing.assert_array_equal(
    here.nearest(query, 5).rows, there.nearest(query, 5).rows
  )
  server.requests.clear()
  build(f"{bucket}/index", f"{bucket}/images")
  assert "PUT" not in {method for method, _ in server.requests}


def test_a_vocabulary(bucket, tmp_path):
  helpers.scenes_tokenizer().save(tmp_path / "words")
  copies.copy_folder(tmp_path / "words", f"{bucket}/words")
  files.write_bytes(f"{bucket}/words/model.bin", bytes(100))
  there = tokenizer.Tokenizer.load(str(tmp_path / "words"))
  assert tokenizer.Tokenizer.load(f"{bucket}/words").digest() == there.digest()


def test_weights_that_are_not_there(bucket):
  with pytest.raises(ValueError, match=f"{bucket}/model: there is no such"):
    hub.fetch(f"{bucket}/model")
