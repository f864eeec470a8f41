"""Which devices a job runs on, and which it leaves unused."""

import collections
import logging
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from blip_jax.runtime import files

log = logging.getLogger(__name__)

# Where Linux shows an accelerator, and the extra of jax that uses it.
_ACCELERATORS = (
  (
    "an NVIDIA GPU",
    ("/dev/nvidia[0-9]*", "/proc/driver/nvidia/gpus/*"),
    "jax[cuda12]",
    ", or jax[cuda13] with a driver of version 580 or later",
  ),
  ("a TPU", ("/dev/accel[0-9]*",), "jax[tpu]", ""),
)

# Of all CPU devices together.
_IMAGES_ON_CPU = 8
# In bytes, of an accelerator: what a process of JAX gets on one with 40 GB.
_LARGE_MEMORY = 28 * 2**30


def found() -> list[Any]:
  """All devices of the job.

  Raises:
    ValueError: JAX finds none of the platforms that it was told to use.
  """
  try:
    return jax.devices()
  except (RuntimeError, AssertionError) as error:
    platforms = jax.config.values["jax_platforms"] or ""
    raise ValueError(
      f"JAX finds no device: JAX_PLATFORMS={platforms}"
      + (f", {error}" if str(error) else "")
      + ". Without JAX_PLATFORMS it takes the best that is there; "
      "JAX_PLATFORMS=cpu runs on the CPU"
    ) from error


def report(devices: Sequence[Any]) -> None:
  """Logs the devices of a job, and warns of an accelerator without a job."""
  log.info("Devices: %s", describe(devices))
  if all(device.platform == "cpu" for device in devices):
    warning = unused()
    if warning:
      log.warning(warning)


def describe(devices: Sequence[Any]) -> str:
  """Number, kind and platform: `8 x NVIDIA H100 80GB HBM3 (gpu)`."""
  kinds = collections.Counter((d.device_kind, d.platform) for d in devices)
  text = ", ".join(
    f"{number} x {kind} ({platform})"
    for (kind, platform), number in kinds.items()
  )
  processes = len({device.process_index for device in devices})
  return f"{text} of {processes} processes" if processes > 1 else text


def images_per_batch(devices: np.ndarray, num_frames: int = 0) -> int:
  """Images, or videos, that a model should get at a time if nobody says how
  many.

  Enough to keep accelerators busy: one H100 captioned 1.27 times as many images
  a second in batches of 256 as in batches of 64. A CPU gains nothing from more
  than a few.

  Args:
    devices: those of a mesh.
    num_frames: of each video; 0: they are images.
  """
  device = devices.flat[0]
  if device.platform == "cpu":
    images = _IMAGES_ON_CPU
  else:
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    images = (256 if memory >= _LARGE_MEMORY else 64) * devices.size
  return max(images // max(num_frames, 1), 1)


def unused() -> str:
  """Says which accelerator of this machine JAX does not use, and what helps.

  Call it if JAX runs on the CPU.  Returns "" if there is no accelerator.
  """
  for name, paths, extra, or_else in _ACCELERATORS:
    if not any(map(files.glob, paths)):
      continue
    text = f"This job runs on the CPU only, although there is {name}: "
    reason = _hidden_by()
    if reason:
      return f"{text}{reason}"
    # Without its version, pip may choose a jax that this package does not take.
    return (
      f"{text}jax cannot use it. What helps: pip install "
      f"'{extra}=={jax.__version__}'{or_else}"
    )
  return ""


def _hidden_by() -> str:
  """The setting that keeps JAX from using an accelerator; "" if none does."""
  platforms = os.environ.get("JAX_PLATFORMS")
  if platforms:
    return f"JAX_PLATFORMS={platforms}"
  visible = os.environ.get("CUDA_VISIBLE_DEVICES")
  if visible in ("", "-1"):
    return f"CUDA_VISIBLE_DEVICES={visible}"
  return ""
