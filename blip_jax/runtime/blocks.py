"""Ranges of objects, read in blocks and ahead where they are read in order."""

import collections
import concurrent.futures
import functools
import threading
from collections.abc import Callable, Hashable

BLOCK_BYTES = 1 << 22
# What is kept in memory: that of 64 MiB.
_MAX_BLOCKS = 16
_MAX_OBJECTS = 4096
# Ranges of one object that begin so near to each other are read in order, after
# so many of them: threads do not keep the order exactly.
_NEAR_BYTES = BLOCK_BYTES
_NEAR_READS = 4
# A request for a range by itself also gets what follows: of a sample in a
# shard, the text is behind the image.
_TAIL_BYTES = 1 << 12
_MAX_TAILS = 256


@functools.cache
def threads() -> concurrent.futures.ThreadPoolExecutor:
  """Threads that wait for a store."""
  return concurrent.futures.ThreadPoolExecutor(16, "blocks")


class ReadAhead:
  """Reads ranges of any number of objects; several threads may call it.

  A range by itself is one request for this range and the little behind it.
  Where ranges of an object follow each other, as in a shard that is read from
  its beginning, a request gets a block of many, and the next block comes
  meanwhile.

  Args:
    fetch: of an object, start and size in bytes -> content; less of it, or
      nothing, where the object ends before.
  """

  def __init__(self, fetch: Callable[[Hashable, int, int], memoryview]):
    self._fetch = fetch
    self._lock = threading.Lock()
    # (object, number of the block) -> its content; last used last.
    self._blocks: collections.OrderedDict[
      tuple[Hashable, int], concurrent.futures.Future[memoryview]
    ] = collections.OrderedDict()
    # (object, thread) -> where the last range ended, and what is behind it.
    self._tails: collections.OrderedDict[
      tuple[Hashable, int], tuple[int, memoryview]
    ] = collections.OrderedDict()
    # Object -> where the last range began, and how many were near before it.
    self._runs: collections.OrderedDict[Hashable, tuple[int, int]] = (
      collections.OrderedDict()
    )

  def read(self, object: Hashable, start: int, size: int) -> bytes:
    """`size` bytes from `start` on, or as many as there are."""
    if size <= 0:
      return b""
    first, last = start // BLOCK_BYTES, (start + size - 1) // BLOCK_BYTES
    if last - first > 1 or not self._is_in_order(object, start):
      return self._single(object, start, size)
    futures = [self._block(object, n) for n in range(first, last + 1)]
    pieces = []
    for number, future in enumerate(futures, first):
      begin = max(0, start - number * BLOCK_BYTES)
      end = start + size - number * BLOCK_BYTES
      pieces.append(self._content(object, number, future)[begin:end])
    is_last = len(futures[-1].result()) < BLOCK_BYTES
    if not is_last:
      self._block(object, last + 1)
    return b"".join(pieces)

  def _single(self, object: Hashable, start: int, size: int) -> bytes:
    key = object, threading.get_ident()
    with self._lock:
      begin, tail = self._tails.get(key, (0, memoryview(b"")))
    if begin <= start and start + size <= begin + len(tail):
      return bytes(tail[start - begin : start - begin + size])
    content = self._fetch(object, start, size + _TAIL_BYTES)
    with self._lock:
      # A copy, since the rest of the content is to be freed.
      self._tails.pop(key, None)
      self._tails[key] = start + size, memoryview(bytes(content[size:]))
      if len(self._tails) > _MAX_TAILS:
        self._tails.popitem(last=False)
    return bytes(content[:size])

  def _is_in_order(self, object: Hashable, start: int) -> bool:
    with self._lock:
      before, count = self._runs.pop(object, (-_NEAR_BYTES - 1, 0))
      count = count + 1 if abs(start - before) <= _NEAR_BYTES else 0
      self._runs[object] = start, count
      if len(self._runs) > _MAX_OBJECTS:
        self._runs.popitem(last=False)
    return count >= _NEAR_READS

  def _block(
    self, object: Hashable, number: int
  ) -> concurrent.futures.Future[memoryview]:
    """The block, which is read now if it is not there yet."""
    key = object, number
    with self._lock:
      future = self._blocks.pop(key, None)
      if future is None:
        start = number * BLOCK_BYTES
        future = threads().submit(self._fetch, object, start, BLOCK_BYTES)
      self._blocks[key] = future
      if len(self._blocks) > _MAX_BLOCKS:
        self._blocks.popitem(last=False)
    return future

  def _content(
    self,
    object: Hashable,
    number: int,
    future: concurrent.futures.Future[memoryview],
  ) -> memoryview:
    try:
      return future.result()
    except Exception:
      with self._lock:  # so that another try reads it again
        self._blocks.pop((object, number), None)
      raise
