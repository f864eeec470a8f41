"""Two processes do what one process does, on the same rows."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from blip_jax import defaults
from blip_jax.data import datasets, position
from blip_jax.inference import caption_images, loading
from blip_jax.runtime import resumable, snapshot
from tests import QUICK_TO_COMPILE, helpers

ROOT = pathlib.Path(__file__).resolve().parent.parent

FLAGS = (
  "--config.num_steps=2",
  "--config.batch_size=8",
  "--config.model.image_size=16",
  "--config.optim.warmup_steps=1",
  "--config.log_every_steps=1",
  "--config.checkpoint.every_steps=2",
  "--config.pretrain.queue_size=20",
  "--config.data.augment=True",
  "--config.evals.scenes_val.source=",
  "--config.mesh.data=1",
  "--config.mesh.fsdp=2",
)


def start(config, workdir, devices, *flags):
  xla = f"--xla_force_host_platform_device_count={devices} "
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "blip_jax.main",
      f"--config={ROOT}/configs/{config}.py",
      f"--workdir={workdir}",
      *flags,
    ],
    env={**os.environ, "XLA_FLAGS": xla + QUICK_TO_COMPILE},
    cwd=workdir.parent,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def start_together(config, workdir, count, devices, *flags):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  return [
    start(
      config,
      workdir,
      devices,
      f"--distributed={address},{count},{index}",
      *flags,
    )
    for index in range(count)
  ]


def start_two(config, workdir, *flags):
  return start_together(config, workdir, 2, 1, *flags)


def finish(processes):
  """What each of them printed."""
  printed = []
  for process in processes:
    out, output = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    printed.append(out)
  return printed


def metrics(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  return [row for row in rows if "train/loss" in row]


MESHES = {1: (4, 1, 1), 2: (1, 2, 2), 4: (2, 2, 1)}
STEPS = 20


def begin(workdir, count):
  """A training on four devices, of one, two or four processes."""
  axes = ("data", "fsdp", "tensor")
  flags = [
    f"--config.mesh.{axis}={size}"
    for axis, size in zip(axes, MESHES[count], strict=True)
  ]
  flags = [*FLAGS, *flags, f"--config.num_steps={STEPS}"]
  if count == 1:
    return [start("quickstart", workdir, 4, *flags)]
  return start_together("quickstart", workdir, count, 4 // count, *flags)


def losses_of(workdir):
  """The losses of all its steps, each of which was done once."""
  rows = metrics(workdir)
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  return [{name: row[f"train/{name}"] for name in LOSSES} for row in rows]


LOSSES = ("loss", "loss_itc", "loss_itm", "loss_lm", "temp")


@pytest.mark.slow
def test_losses_do_not_depend_on_processes_and_mesh(tmp_path):
  """Sampled negatives, dropout and augmentation included."""
  for count in MESHES:
    finish(begin(tmp_path / str(count), count))
  alone = losses_of(tmp_path / "1")
  for count in (2, 4):
    assert_close(losses_of(tmp_path / str(count)), alone)


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_on_another_mesh(tmp_path):
  """Each number of them is stopped as schedulers do, and followed by each
  other; the losses are those of one process that nobody has stopped."""
  finish(begin(tmp_path / "alone", 1))
  workdir = tmp_path / "elastic"
  stopped_at = 0
  for count in (1, 2, 4, 1, 4, 2):
    processes = begin(workdir, count)
    _await_step(workdir, stopped_at + 1, processes)
    processes[-1].send_signal(signal.SIGTERM)
    for process in processes:
      _, said = process.communicate(timeout=90)
      assert process.returncode == 75, said[-3000:]
    last = snapshot.find(workdir)
    assert stopped_at < int(last.name) < STEPS
    stopped_at = int(last.name)
    saved = sorted(path.name for path in (last / "data").glob("process_*"))
    assert saved == [f"process_{i}-of-{count}.json" for i in range(count)]
  finish(begin(workdir, 1))
  assert_close(losses_of(workdir), losses_of(tmp_path / "alone"))
  (path,) = (workdir / f"checkpoints/{STEPS}/data").glob("process_*")
  state = json.loads(path.read_text())
  read = position.Left(**state["left"]).after([state["next_index"]], 8)
  # All rows before this one have been read, and no other.
  assert read == position.Left([], 8 * STEPS)


def _await_step(workdir, step, processes):
  """Waits until a run has done a step."""
  deadline = time.monotonic() + 240
  path = workdir / "metrics.jsonl"
  while not path.exists() or all(r["step"] < step for r in metrics(workdir)):
    for process in processes:
      assert process.poll() is None, process.communicate()[1][-3000:]
    assert time.monotonic() < deadline
    time.sleep(0.02)


def assert_close(losses, expected):
  for row, other in zip(losses, expected, strict=True):
    assert row == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_two_processes_caption_a_folder(tmp_path):
  """One file for both, each image once; one process may fail and resume."""
  images = helpers.write_images(tmp_path / "images")
  model = helpers.write_captioner(tmp_path / "model")
  flags = (
    f"--config.images={images}",
    f"--config.model={model}",
    "--config.batch_size=2",
  )
  out = lambda name: f"--config.out={tmp_path / name}"
  finish([start("caption_images", tmp_path, 1, *flags, out("one"))])
  # An earlier run with the same settings, cut in a line.
  lines = (tmp_path / "one").read_text().splitlines(keepends=True)
  assert len(lines) == 7
  config = defaults.caption_images()
  config.images = str(images)
  settings = caption_images._settings(
    config,
    "float32",
    loading.load(model),
    datasets.open_images(str(images)),
    {"sample": False, "num_return_sequences": 1},
  )
  resumable.begin(tmp_path / "two.job.json", settings, hint="")
  (tmp_path / "two.part1").write_text(lines[2] + lines[4][:9])
  printed, _ = finish(start_two("caption_images", tmp_path, *flags, out("two")))
  assert (tmp_path / "two").read_text().splitlines(keepends=True) == lines
  assert [p.name for p in tmp_path.glob("two.*")] == ["two.job.json"]
  output = [line.split() for line in printed.splitlines()]
  assert ["images", "7"] in output and ["unreadable", "1"] in output


@pytest.mark.slow
def test_two_processes_rank_the_same(tmp_path):
  """Each process scores its local images; both get all scores."""
  trained, one, two = tmp_path / "trained", tmp_path / "one", tmp_path / "two"
  finish([start("quickstart", trained, 2, *FLAGS)])
  flags = (
    "--config.job=evaluate",
    f"--config.init.weights={trained}",
    "--config.model.image_size=16",
    "--config.evals.batch_size=4",
    # No multiple of the batch: the last one is filled up.
    "--config.evals.scenes_val.source=scenes:val?num=21",
    "--config.evals.scenes_val.k_test=5",
  )
  finish([start("quickstart", one, 1, *flags)])
  finish(start_two("quickstart", two, *flags))
  alone, together = (
    json.loads((workdir / "results.json").read_text()) for workdir in (one, two)
  )
  assert "scenes_val/itc_r_mean" in alone
  assert together == pytest.approx(alone)


LONG = (*FLAGS, "--config.num_steps=100000")


def begin_long_run(workdir):
  """Two processes that train; both have compiled, and one has written steps."""
  both = start_two("quickstart", workdir, *LONG)
  _await_step(workdir, 1, both)
  return both


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_a_process_ends_the_other(tmp_path, victim):
  """Also that of the one which coordinates them."""
  both = begin_long_run(tmp_path / "run")
  start = time.monotonic()
  both[victim].kill()
  _, said = both[1 - victim].communicate(timeout=200)
  seconds = time.monotonic() - start
  both[victim].communicate()
  assert both[1 - victim].returncode in (75, -signal.SIGABRT), said[-3000:]
  assert seconds < 90
  assert len(said[-20_000:].splitlines()) < 200


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_two_processes_stop_together_when_one_is_asked(tmp_path, asked):
  workdir = tmp_path / "run"
  both = begin_long_run(workdir)
  both[asked].send_signal(signal.SIGTERM)
  for process in both:
    _, said = process.communicate(timeout=90)
    assert process.returncode == 75, said[-3000:]
    assert "is done and saved" in said
  saved = [int(folder.name) for folder in (workdir / "checkpoints").iterdir()]
  assert max(saved) == metrics(workdir)[-1]["step"]
