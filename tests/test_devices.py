"""The log says what a job runs on, and which accelerator it leaves unused."""

import dataclasses
import fnmatch
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from blip_jax.runtime import devices


@dataclasses.dataclass
class Device:
  device_kind: str
  platform: str
  process_index: int = 0


@dataclasses.dataclass
class Accelerator(Device):
  bytes_limit: int | None = None

  def memory_stats(self):
    return self.bytes_limit and {"bytes_limit": self.bytes_limit}


H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
  "found, expected",
  [
    ([Device("cpu", "cpu")], "1 x cpu (cpu)"),
    ([Device(H100, "gpu")] * 8, f"8 x {H100} (gpu)"),
    (
      [Device("TPU v4", "tpu", i // 4) for i in range(8)],
      "8 x TPU v4 (tpu) of 2 processes",
    ),
    (
      [Device(H100, "gpu"), Device("A", "gpu")],
      f"1 x {H100} (gpu), 1 x A (gpu)",
    ),
  ],
)
def test_devices_in_words(found, expected):
  assert devices.describe(found) == expected


@pytest.fixture
def machine(monkeypatch):
  """The devices that Linux shows; JAX has found the CPU only."""
  paths = []
  glob = lambda pattern: fnmatch.filter(paths, pattern)
  monkeypatch.setattr(devices.files, "glob", glob)
  for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
    monkeypatch.delenv(name, raising=False)
  return paths


@pytest.mark.parametrize(
  "path, expected",
  [
    ("/dev/nvidia0", ("an NVIDIA GPU", "jax[cuda12]", "jax[cuda13]")),
    ("/proc/driver/nvidia/gpus/0000:01:00.0", ("an NVIDIA GPU",)),
    ("/dev/accel0", ("a TPU", "jax[tpu]")),
  ],
)
def test_an_accelerator_that_jax_does_not_use_is_warned_of(
  machine, caplog, path, expected
):
  machine.append(path)
  devices.report([Device("cpu", "cpu")])
  for text in expected:
    assert text in caplog.text
  assert f"=={jax.__version__}'" in caplog.text


@pytest.mark.parametrize(
  "path, device",
  [
    # The control device is there even if no GPU is.
    ("/dev/nvidiactl", Device("cpu", "cpu")),
    ("/dev/nvidia0", Device(H100, "gpu")),
  ],
)
def test_no_warning_without_an_idle_accelerator(machine, caplog, path, device):
  machine.append(path)
  with caplog.at_level("INFO", "blip_jax"):
    devices.report([device])
  assert [record.levelname for record in caplog.records] == ["INFO"]
  assert device.device_kind in caplog.text


def test_what_hides_a_gpu_is_named(machine, monkeypatch):
  machine.append("/dev/nvidia0")
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
  assert devices.unused().endswith("GPU: CUDA_VISIBLE_DEVICES=-1")
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert devices.unused().endswith("GPU: JAX_PLATFORMS=cpu")


@pytest.mark.parametrize("platform", ["cuda", "gpu"])
def test_a_platform_that_is_not_there_is_one_message(platform, tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, "-m", "blip_jax.main"),
      *("--config=quickstart", f"--workdir={tmp_path}/run"),
    ],
    env={**os.environ, "JAX_PLATFORMS": platform},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 1
  *_, last = done.stderr.splitlines()
  assert last.startswith("error: JAX finds no device: JAX_PLATFORMS=")
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
  "found, expected",
  [
    (Device("cpu", "cpu"), 8),
    (Accelerator(H100, "gpu", bytes_limit=59 * 2**30), 4 * 256),
    (Accelerator("NVIDIA T4", "gpu", bytes_limit=11 * 2**30), 4 * 64),
    (Accelerator("TPU v5 lite", "tpu"), 4 * 64),
  ],
)
def test_images_of_a_batch_suit_the_devices(found, expected):
  mesh = np.array([[found] * 4])
  assert devices.images_per_batch(mesh) == expected
  assert devices.images_per_batch(mesh, num_frames=8) == expected // 8
  assert devices.images_per_batch(mesh, num_frames=9999) == 1
