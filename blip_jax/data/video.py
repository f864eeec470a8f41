"""Frames of a video; needs PyAV, the extra [video]."""

import itertools
import os
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, UInt8

from blip_jax.data import transforms

try:
  import av
except ImportError as error:
  raise ValueError(
    "videos are decoded by PyAV, which is not installed: "
    "pip install 'blip_jax[video]'"
  ) from error


def read(
  path: str | os.PathLike, num_frames: int, size: transforms.Size
) -> UInt8[np.ndarray, "F H W 3"]:
  """Evenly spread frames of a video, in RGB.

  As in the original, they are scaled while they are decoded, bilinearly and
  without regard to their proportions.

  A name without an ending means an .mp4: MSR-VTT's list has such names.

  Raises:
    transforms.BadSample: it cannot be decoded, or has fewer frames.
  """
  path = os.fspath(path)
  if not os.path.splitext(path)[1]:
    path += ".mp4"
  height, width = (size, size) if isinstance(size, int) else size
  # Containers may lie about how many frames they hold, so they are counted.
  number = sum(1 for _ in _decoded(path))
  chosen = frame_numbers(number, num_frames) if number >= num_frames else []
  if not len(chosen):
    detail = f"{path}: {number} frames, of which {num_frames} are wanted"
    raise transforms.BadSample("too_few_frames", detail)
  wanted = set(chosen.tolist())
  return np.stack(
    [
      frame.to_ndarray(
        format="rgb24", width=width, height=height, interpolation="BILINEAR"
      )
      for place, frame in enumerate(
        itertools.islice(_decoded(path), chosen[-1] + 1)
      )
      if place in wanted
    ]
  )


def frame_numbers(
  number: int, num_frames: int
) -> Int[np.ndarray, " num_frames"]:
  """Which of a video's frames are seen: the first, and on in equal steps."""
  return np.arange(num_frames) * number // num_frames


def _decoded(path: str) -> Iterator["av.VideoFrame"]:
  if not os.path.isfile(path):
    raise transforms.BadSample("missing", f"{path}: no such file")
  try:
    with av.open(path) as container:
      if not container.streams.video:
        raise transforms.BadSample("broken_video", f"{path}: has no pictures")
      stream = container.streams.video[0]
      stream.thread_type = "AUTO"
      for frame in container.decode(stream):
        if frame.width * frame.height > transforms.MAX_PIXELS:
          detail = f"{path}: frames of {frame.width} x {frame.height} pixels"
          raise transforms.BadSample("too_large", detail)
        yield frame
  except av.FFmpegError as error:
    raise transforms.BadSample("broken_video", f"{path}: {error}") from error
