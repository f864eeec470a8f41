"""Objects as files: to read in pieces and seek in, or to write at their end."""

import concurrent.futures
import contextlib
import errno
import io
import os
import tempfile
import threading
import time
from typing import Any

from blip_jax.runtime import blocks, buckets
from blip_jax.runtime.paths import Address

# What is appended to an object is uploaded after so many seconds, and not
# before so many times as long as the last upload took.
APPEND_SECONDS, _APPEND_PATIENCE = 10.0, 20.0


class Reader(io.RawIOBase):
  """An object that is read in blocks, the next one ahead.

  Raises:
    buckets.Changed: while reading, if the object changes.
  """

  def __init__(self, address: Address):
    self._address = address
    part = buckets.get(address, 0, blocks.BLOCK_BYTES)
    head = part.head if part else buckets.head(address)  # it is empty
    self.name, self.mode = str(address), "rb"
    self._size, self._etag = head.stat.size, head.etag
    self._at, self._last = 0, -1
    first = concurrent.futures.Future()
    first.set_result(part.content if part else memoryview(b""))
    # Number -> content, last used last.
    self._blocks: dict[int, concurrent.futures.Future[memoryview]] = {0: first}

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._at

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}
    if (at := start[whence] + offset) < 0:
      raise OSError(errno.EINVAL, "a negative position", self.name)
    self._at = at
    return at

  def readinto(self, buffer: Any) -> int:
    if self._at >= self._size:
      return 0
    number, begin = divmod(self._at, blocks.BLOCK_BYTES)
    content = self._block(number).result()
    if number == self._last + 1 and number * blocks.BLOCK_BYTES < (
      self._size - len(content)
    ):
      self._block(number + 1)
    self._last = number
    piece = content[begin : begin + len(buffer)]
    buffer[: len(piece)] = piece
    self._at += len(piece)
    return len(piece)

  def _block(self, number: int) -> concurrent.futures.Future[memoryview]:
    future = self._blocks.pop(number, None)
    if future is None:
      start = number * blocks.BLOCK_BYTES
      future = blocks.threads().submit(self._read, start)
    self._blocks[number] = future
    while len(self._blocks) > 3:
      del self._blocks[next(iter(self._blocks))]
    return future

  def _read(self, start: int) -> memoryview:
    part = buckets.get(self._address, start, blocks.BLOCK_BYTES, self._etag)
    if part is None:
      raise buckets.Changed(
        errno.ESTALE, "the object has become shorter", self.name
      )
    return part.content


def opened(address: Address) -> io.BufferedReader:
  return io.BufferedReader(Reader(address), 1 << 16)


class Appended(io.BufferedIOBase):
  """An object to write behind its end.

  Stores cannot append: what is written goes to a local file, of which the
  object becomes a copy every few seconds, and on `close`.
  """

  def __init__(self, address: Address):
    self._address = address
    self.name, self.mode = str(address), "ab"
    self._file = tempfile.TemporaryFile()  # noqa: SIM115
    self._lock = threading.Lock()
    self._is_dirty = False
    self._due = time.monotonic() + APPEND_SECONDS
    self._timer: threading.Timer | None = None
    self._error: OSError | None = None
    with contextlib.suppress(FileNotFoundError), opened(address) as old:
      while piece := old.read(buckets.PART_BYTES):
        self._file.write(piece)

  def writable(self) -> bool:
    return True

  def write(self, content: Any) -> int:
    with self._lock:
      self._is_dirty = True
      return self._file.write(content)

  def flush(self) -> None:
    with self._lock:
      if self._error is not None:
        error, self._error = self._error, None
        raise error
      wait = self._due - time.monotonic()
      if self._is_dirty and wait <= 0:
        self._upload()
      elif self._is_dirty and self._timer is None:
        self._timer = threading.Timer(wait, self._upload_later)
        self._timer.daemon = True
        self._timer.start()

  def _upload_later(self) -> None:
    with self._lock:
      self._timer = None
      try:
        if self._is_dirty and not self._file.closed:
          self._upload()
      except OSError as error:  # raised by the next call
        self._error = error

  def _upload(self) -> None:
    begin = time.monotonic()
    self._file.seek(0)
    buckets.put(self._address, self._file)
    self._file.seek(0, os.SEEK_END)
    self._is_dirty = False
    end = time.monotonic()
    self._due = end + max(APPEND_SECONDS, _APPEND_PATIENCE * (end - begin))

  def close(self) -> None:
    if self.closed:
      return
    if self._timer is not None:
      self._timer.cancel()
    try:
      with self._lock:
        if self._is_dirty:
          self._upload()
    finally:
      self._is_dirty = False
      super().close()
      self._file.close()
