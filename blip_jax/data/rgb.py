"""PIL images as RGB pixels, and which numbers are pixels."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from blip_jax.data.rejects import BadSample

# Pixels that are converted at once.
_STRIP_PIXELS = 1 << 19
# PIL's modes for grey images of more than 8 bits.
_DEEP_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def pixels(image: PIL.Image.Image) -> UInt8[np.ndarray, "H W 3"]:
  """Decodes an image, if PIL has not yet, and converts it.

  Raises:
    BadSample: it is damaged, or its numbers may mean anything.
    MemoryError: it needs more memory than there is.
  """
  with _naming_damage():
    # It may have another size then: PIL turns a TIFF as its EXIF says.
    image.load()
    return _by_strips(image)


def converted(image: PIL.Image.Image) -> PIL.Image.Image:
  """Like `pixels`, as a PIL image: the given one, if it is RGB."""
  with _naming_damage():
    image.load()
    if image.mode == "RGB":
      return image
  return PIL.Image.fromarray(pixels(image))


@contextlib.contextmanager
def _naming_damage() -> Iterator[None]:
  try:
    yield
  except (BadSample, MemoryError):
    raise
  except Exception as error:
    raise damaged(error) from error


def _by_strips(image: PIL.Image.Image) -> UInt8[np.ndarray, "H W 3"]:
  """Converts some rows at a time, so that copies in other modes stay small."""
  width, height = image.size
  pixels = np.empty((height, width, 3), np.uint8)
  num_rows = max(1, _STRIP_PIXELS // width)
  ranges = []
  for top in range(0, height, num_rows):
    # A copy: the image may be the user's.
    strip = image.crop((0, top, width, min(top + num_rows, height)))
    if image.mode in (*_DEEP_GREY, "F"):
      values = np.asarray(strip)
      ranges.append((values.dtype, values.min(), values.max()))
    if image.mode in _DEEP_GREY:
      rgb = (np.asarray(strip) >> 8)[..., None]
    else:
      # It does not change the colours, but PIL would warn about each such
      # palette.
      strip.info.pop("transparency", None)
      rgb = np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))
    pixels[top : top + num_rows] = rgb
  if ranges:
    _check_range(*ranges)
  return pixels


def _check_range(*ranges: tuple[np.dtype, Any, Any]) -> None:
  """Refuses numbers that may mean anything: they would turn black or white.

  Args:
    ranges: the type, the least and the largest value of each strip.
  """
  (dtype, *_), *_ = ranges
  is_float = dtype.kind == "f"
  least: Any = np.min([least for _, least, _ in ranges])
  most: Any = np.max([most for *_, most in ranges])
  # Bicubic filters overshoot a little.
  low, high = (-1, 256) if is_float else (0, 0xFFFF)
  # Floats up to 1, or 8 bits that a program stored as 16 or 32.
  is_other_unit = 0 < most <= (1 if is_float else 0xFF)
  if not (low <= least and most <= high) or is_other_unit:  # also NaN
    expected = "0 to 255" if is_float else "0 to 65535, some above 255"
    raise BadSample(
      "unknown_range",
      f"expected {dtype} pixels from {expected}, found {least} to "
      f"{most}; save the image with 8 bits",
    )


def damaged(error: Exception) -> BadSample:
  """PIL's readers raise almost any exception on damaged files."""
  if isinstance(error, PIL.Image.DecompressionBombError):
    return BadSample("too_large", str(error))
  # What stopped a C library that was reading, in that library's words.
  if isinstance(error.__cause__, BadSample):
    return error.__cause__
  reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
  return BadSample(reason, f"{type(error).__name__}: {error}")


def from_array(image: np.ndarray) -> PIL.Image.Image:
  """Pixels [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] as a PIL image.

  Raises:
    BadSample: they are no such pixels.
  """
  grey = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1)
  if image.dtype != np.uint8 or not (
    grey or (image.ndim == 3 and image.shape[2] in (3, 4))
  ):
    detail = (
      "expected uint8 pixels from 0 to 255, [H, W], [H, W, 1], [H, W, 3] or "
      f"[H, W, 4], found {image.dtype} {image.shape}; convert them first: "
      "(255 * x).round().astype('uint8') of floats from 0 to 1, or "
      "(x >> 8).astype('uint8') of 16 bits"
    )
    raise BadSample("bad_array", detail)
  if image.size == 0:
    raise BadSample("empty", f"an array of shape {image.shape}")
  return PIL.Image.fromarray(image.reshape(image.shape[:2]) if grey else image)
