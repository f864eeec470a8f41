"""Two processes train on the rows that one process trains on."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

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


def start(workdir, devices, *extra):
  # Compiling takes most of the time here, so let it be quick.
  flags = (
    f"--xla_force_host_platform_device_count={devices} "
    "--xla_backend_optimization_level=0"
  )
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "blip_jax.main",
      f"--config={ROOT}/configs/quickstart.py",
      f"--workdir={workdir}",
      *FLAGS,
      *extra,
    ],
    env={**os.environ, "XLA_FLAGS": flags},
    cwd=workdir.parent,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(processes):
  for process in processes:
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told[-3000:]


def metrics(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_two_processes_train_on_the_same_rows(tmp_path):
  """Weights split over both, rows dealt out, one checkpoint of both.

  Each process has every other row, so the batch is one process's in another
  order: what averages over rows is equal, while drawn negatives are others.
  """
  one, two = tmp_path / "one", tmp_path / "two"
  finish([start(one, 2)])
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  finish(
    [start(two, 1, f"--distributed={address},2,{index}") for index in range(2)]
  )
  alone, together = metrics(one), metrics(two)
  assert [row["step"] for row in together] == [1, 2]
  for name in ("loss_itc", "loss_lm", "nll_lm", "temp"):
    found, expected = together[0][f"train/{name}"], alone[0][f"train/{name}"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=name)
  saved = sorted(p.name for p in (two / "checkpoints" / "2" / "data").iterdir())
  assert [name for name in saved if name.startswith("process")] == [
    "process_0-of-2.json",
    "process_1-of-2.json",
  ]
