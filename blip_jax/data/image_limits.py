"""What images may cost: bytes, pixels, memory and processor time.

A file of some hundred bytes may claim gigabytes, or minutes of work.
`image_headers` refuses what can be seen from headers.
"""

import collections
import contextlib
import io
import os
import threading
import time
from collections.abc import Iterator

import PIL.Image

from blip_jax.data.rejects import BadSample

# Encoded bytes of one image.
MAX_BYTES = 512 << 20
# Pixels along one side, as in JPEG: a filter has weights for each of them.
MAX_SIDE = 65_535
# Processor time that reading one image may take, in seconds.
MAX_SECONDS = 20.0
# What all images that are being decoded in a process may take, in bytes.
MAX_MEMORY = 2 << 30

# Peak memory of decoding a pixel, as measured, in bytes. Most libraries decode
# into PIL's image; these hold further copies. A progressive JPEG takes 13.
_BYTES_PER_PIXEL = {"WEBP": 22, "AVIF": 22, "JPEG2000": 26}
_BYTES_PER_PIXEL_OF_OTHERS = 13
# Resizing holds a row of the result for each row of the image.
_MIN_WIDTH = 1024


class Stream(io.BytesIO):
  """Encoded bytes that stop their reader after some processor time.

  Decoders ask for a file in pieces. Python cannot stop a function of a C
  library, but it can refuse the next piece.
  """

  def __init__(self, content: bytes, seconds: float = MAX_SECONDS):
    super().__init__(content)
    self._seconds = seconds
    # That of this thread: a busy machine makes no image bad.
    self._end = time.thread_time() + seconds

  def read(self, size: int | None = -1) -> bytes:
    if time.thread_time() > self._end:
      detail = f"reading takes more than {self._seconds:g} s of processor time"
      raise BadSample("too_slow", detail)
    return super().read(size)


class Budget:
  """An amount that threads share; who asks for more than is left waits.

  An amount larger than the whole is granted alone. Nobody overtakes, so that
  a large amount is granted in the end. A thread must not ask twice.
  """

  def __init__(self, total: int):
    self._total = total
    self._reset()
    # A child process has none of the threads that hold something.
    os.register_at_fork(after_in_child=self._reset)

  def _reset(self) -> None:
    self._used = 0
    self._waiting: collections.deque[object] = collections.deque()
    self._changed = threading.Condition()

  @contextlib.contextmanager
  def reserved(self, amount: int) -> Iterator[None]:
    amount = min(amount, self._total)
    ticket = object()
    with self._changed:
      self._waiting.append(ticket)
      try:
        self._changed.wait_for(
          lambda: (
            self._waiting[0] is ticket and self._used + amount <= self._total
          )
        )
        self._used += amount
      finally:
        self._waiting.remove(ticket)
        self._changed.notify_all()
    try:
      yield
    finally:
      with self._changed:
        self._used -= amount
        self._changed.notify_all()


# Files that are being read, and images that are being decoded. A thread may
# hold of the first when it asks for the second, never the other way round.
ENCODED = Budget(MAX_BYTES)
DECODED = Budget(MAX_MEMORY)


def memory(image: PIL.Image.Image) -> int:
  """Bytes that decoding and resizing an image take at most."""
  width, height = image.size
  per_pixel = _BYTES_PER_PIXEL.get(
    image.format or "", _BYTES_PER_PIXEL_OF_OTHERS
  )
  return max(width, _MIN_WIDTH) * height * per_pixel


def check_bytes(size: int) -> None:
  """Raises `BadSample` if an encoded image is too large, or empty."""
  if size > MAX_BYTES:
    detail = f"{size} bytes; at most {MAX_BYTES} are allowed"
    raise BadSample("too_large", detail)
  if not size:
    raise BadSample("empty", "zero bytes")


def check_size(width: int, height: int, max_pixels: int) -> None:
  """Raises `BadSample` if an image has too many pixels, or none."""
  found = f"{width} x {height} pixels"
  if width * height > max_pixels:
    raise BadSample("too_large", f"{found}; at most {max_pixels} are allowed")
  if max(width, height) > MAX_SIDE:
    detail = f"{found}; at most {MAX_SIDE} along a side are allowed"
    raise BadSample("too_large", detail)
  if width * height <= 0:
    raise BadSample("empty", found)
