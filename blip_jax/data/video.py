"""Frames of a video; needs PyAV (the extra [video])."""

import itertools
import os
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8

from blip_jax.data import transforms
from blip_jax.runtime import copies, files

try:
  import av
  import av.error
except ImportError as error:
  raise ValueError(
    "videos are decoded by PyAV, which is not installed: "
    "pip install 'blip_jax[video]'"
  ) from error


def read(
  path: str | os.PathLike, num_frames: int, size: transforms.Size
) -> UInt8[np.ndarray, "F H W 3"]:
  """Returns evenly spaced frames of a video, RGB [F, H, W, 3].

  As in the original, frames are resized while they are decoded, bilinearly and
  without keeping their aspect ratio.

  Args:
    path: of the video. Without an extension it means an .mp4, for the names in
      MSR-VTT's annotations.
    num_frames: F.
    size: of a frame, square or (height, width).

  Raises:
    transforms.BadSample: the video cannot be decoded, or is too short.
  """
  path = os.fspath(path)
  if not os.path.splitext(path)[1]:
    path += ".mp4"
  height, width = (size, size) if isinstance(size, int) else size
  # Frames are counted because the numbers in containers may be wrong.
  total = sum(1 for _ in _decoded(path))
  indices = transforms.frame_numbers(total, num_frames, path).tolist()
  return np.stack(
    [
      frame.to_ndarray(
        format="rgb24", width=width, height=height, interpolation="BILINEAR"
      )
      for index, frame in enumerate(
        itertools.islice(_decoded(path), indices[-1] + 1)
      )
      if index in indices
    ]
  )


def _decoded(path: str) -> Iterator["av.VideoFrame"]:
  if not files.is_file(path):
    raise transforms.BadSample("missing", f"{path}: no such file")
  try:
    with av.open(copies.local_copy(path)) as container:
      if not container.streams.video:
        detail = f"{path}: has no video stream"
        raise transforms.BadSample("broken_video", detail)
      stream = container.streams.video[0]
      stream.thread_type = "AUTO"
      for frame in container.decode(stream):
        if frame.width * frame.height > transforms.MAX_PIXELS:
          detail = f"{path}: frames of {frame.width} x {frame.height} pixels"
          raise transforms.BadSample("too_large", detail)
        yield frame
  except transforms.BadSample:
    raise
  # A damaged file may also break Python's side of the reader.
  except Exception as error:
    detail = f"{path}: {type(error).__name__}: {error}"
    raise transforms.BadSample("broken_video", detail) from error
