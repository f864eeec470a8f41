"""Disks that are full: runs say so, go on, and lose no good checkpoint.

A limit on the size of files does what a full disk does: writing fails.
"""

import contextlib
import json
import os
import resource
import subprocess
import time

import pytest

from blip_jax.runtime import best, checkpoint, metrics, snapshot
from tests import QUICK_TO_COMPILE, helpers, user_runs


@contextlib.contextmanager
def full(num_bytes=1 << 20, pid=0):
  """No file of this process, or another one, can become larger."""
  before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
  resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, before[1]))
  try:
    yield
  finally:
    with contextlib.suppress(ProcessLookupError):  # it has ended
      resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
  monkeypatch.setattr(checkpoint, "_PAUSES", (0.1, 0.1))


@pytest.fixture(scope="module")
def large():
  """A state of 8 MB, and what else a checkpoint needs."""
  toy = helpers.ToyRun((1, 1, 1), width=100_000)
  return toy.make(), helpers.StubLoader(3), helpers.TOY_CONFIG


def names(workdir):
  """Steps. Threads of TensorStore may outlive a save that failed, and leave a
  part of it, which the next start removes."""
  found = os.listdir(workdir / "checkpoints")
  return sorted(name for name in found if "orbax-checkpoint-tmp" not in name)


def test_a_step_that_cannot_be_written_is_replaced_by_the_next(
  tmp_path, large, caplog
):
  store = checkpoint.Checkpoints(tmp_path, 1, max_unsaved_steps=5)
  store.save_now(1, *large)
  with full():
    store.save(2, *large)
    store.save(3, *large)
    store._settle()
  assert names(tmp_path) == ["1"]
  assert "step 2 could not be saved" in caplog.text
  assert "The last checkpoint is of step 1" in caplog.text
  assert "File too large" in caplog.text
  store.save(4, *large)
  store.close()
  assert names(tmp_path) == ["1", "4"]
  assert snapshot.find_sound(tmp_path).name == "4"


def test_a_run_stops_before_it_loses_too_much(tmp_path, large):
  store = checkpoint.Checkpoints(tmp_path, 1, max_unsaved_steps=3)
  store.save_now(1, *large)
  with full():
    for step in (2, 3):
      store.save(step, *large)
      assert not store.is_overdue(step)
    assert store.is_overdue(4)
    with pytest.raises(OSError, match=r"step 4 cannot .* go on from step 1: "):
      store.save(4, *large)
    store.close()
  assert names(tmp_path) == ["1"]
  assert snapshot.find_sound(tmp_path).name == "1"


def test_the_last_step_is_tried_again(tmp_path, large, monkeypatch):
  store = checkpoint.Checkpoints(tmp_path, 1)
  with contextlib.ExitStack() as stack:
    stack.enter_context(full())
    monkeypatch.setattr(checkpoint.time, "sleep", lambda _: stack.close())
    store.save_now(1, *large)
  assert names(tmp_path) == ["1"]
  store.close()


def test_the_best_so_far_stays_if_a_better_one_cannot_be_kept(
  tmp_path, large, caplog
):
  params = large[0].params
  kept = best.Best(tmp_path, ("val/x",))
  assert kept.update(1, params, {"val/x": 1.0})
  with full():
    assert not kept.update(2, params, {"val/x": 2.0})
  assert "step 2, is not kept" in caplog.text
  assert snapshot.find_sound(tmp_path / "best").name == "1"
  assert kept.update(3, params, {"val/x": 2.0})
  assert os.listdir(tmp_path / "best") == ["3"]


def test_metrics_wait_until_they_can_be_written(tmp_path, caplog):
  writer = metrics.MetricWriter(tmp_path)
  writer.write(1, {"a": 1})
  path = tmp_path / "metrics.jsonl"
  with full(path.stat().st_size + 9):  # within a line
    for step in range(2, 50):
      writer.write(step, {"a": step})
  assert caplog.text.count("metrics wait in memory") == 1
  writer.write(50, {"a": 50})
  writer.close()
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  assert rows == [{"step": step, "a": float(step)} for step in range(1, 51)]
  assert len(os.listdir(tmp_path / "tb")) == 2


def begin(workdir, *flags):
  """A run of which nothing can be written from its first steps on."""
  process = subprocess.Popen(
    user_runs.command(workdir, "--config.checkpoint.every_steps=10", *flags),
    env={**os.environ, "XLA_FLAGS": QUICK_TO_COMPILE},
    cwd=workdir.parent,
    stderr=subprocess.PIPE,
    text=True,
  )
  folder = workdir / "checkpoints"
  while not (folder.exists() and snapshot.steps(folder)):
    assert process.poll() is None, process.stderr.read()[-3000:]
    time.sleep(0.02)
  return process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, run):
  workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
  run(workdir, "--config.num_steps=100")
  return workdir


@pytest.mark.slow
def test_a_run_whose_disk_is_full_for_a_while(undisturbed, digest):
  workdir = undisturbed.parent / "for_a_while"
  flags = "--config.num_steps=100", "--config.checkpoint.max_unsaved_steps=100"
  process = begin(workdir, *flags)
  said = ""
  with full(1000, process.pid):
    for line in process.stderr:
      said += line
      if "could not be saved" in line:
        break
  said += process.communicate(timeout=120)[1]
  assert process.returncode == 0, said[-3000:]
  assert "metrics wait in memory" in said
  assert len(said.splitlines()) < 400
  assert digest(workdir) == digest(undisturbed)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  steps = [row["step"] for row in rows if "train/loss" in row]
  assert steps == list(range(1, 101))


@pytest.mark.slow
def test_a_run_whose_disk_stays_full(undisturbed, run, digest):
  workdir = undisturbed.parent / "for_good"
  process = begin(
    workdir,
    "--config.num_steps=100",
    "--config.checkpoint.max_unsaved_steps=20",
  )
  with full(1000, process.pid):
    said = process.communicate(timeout=120)[1]
  assert process.returncode == 1, said[-3000:]
  assert "error: step " in said and "The run stops before it loses" in said
  kept = int(snapshot.find_sound(workdir).name)
  assert f"It can go on from step {kept}: make room" in said
  assert len(said.splitlines()) < 400
  run(workdir, "--config.num_steps=100")
  assert digest(workdir) == digest(undisturbed)
