"""Two processes do what one process does, on the same rows."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from blip_jax import defaults
from blip_jax.data import datasets
from blip_jax.inference import caption_images, loading
from blip_jax.runtime import resumable
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


def start_two(config, workdir, *flags):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  return [
    start(config, workdir, 1, f"--distributed={address},2,{index}", *flags)
    for index in range(2)
  ]


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


@pytest.mark.slow
def test_two_processes_train_on_the_same_rows(tmp_path):
  """Weights split over both, rows dealt out, one checkpoint of both.

  Each process has every other row, so the batch is one process's in another
  order: what averages over rows is equal, while drawn negatives are others.
  """
  one, two = tmp_path / "one", tmp_path / "two"
  finish([start("quickstart", one, 2, *FLAGS)])
  finish(start_two("quickstart", two, *FLAGS))
  alone, together = metrics(one), metrics(two)
  assert [row["step"] for row in together] == [1, 2]
  for name in ("loss_itc", "loss_lm", "nll_lm", "temp"):
    together_loss, alone_loss = (
      together[0][f"train/{name}"],
      alone[0][f"train/{name}"],
    )
    np.testing.assert_allclose(
      together_loss, alone_loss, rtol=1e-5, err_msg=name
    )
  saved = sorted(p.name for p in (two / "checkpoints" / "2" / "data").iterdir())
  assert [name for name in saved if name.startswith("process")] == [
    "process_0-of-2.json",
    "process_1-of-2.json",
  ]


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
  assert not list(tmp_path.glob("two.*"))
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
  deadline = time.monotonic() + 240
  while not (workdir / "metrics.jsonl").exists() or not metrics(workdir):
    assert [one.poll() for one in both] == [None, None]
    assert time.monotonic() < deadline
    time.sleep(0.2)
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
  assert both[1 - victim].returncode in (75, 134), said[-3000:]
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
