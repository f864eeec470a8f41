"""Reads images at the sizes of models, in processes of their own.

Python's lock is held for a seventh to a quarter of the time that an image
takes, so threads of one process fill a few cores, and leave none of it to the
models. Here a thread only hands encoded bytes to a process, and receives pixels
in the array of a batch.

A process is `python -m blip_jax.data.image_readers`. It imports neither JAX nor
the main module of its parent, and ends when its standard input does: so none is
left, however the parent ends. A decoder that crashes costs one image.
"""

import contextlib
import json
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
from jaxtyping import UInt8

from blip_jax.data import image_limits, rejects, transforms
from blip_jax.runtime import host

# A process that dies is not always the image's fault.
_TRIES = 2
# Kind and number of bytes of a request; kind, processor time and number of
# bytes of a reply.
_REQUEST, _REPLY = struct.Struct("<cQ"), struct.Struct("<cdQ")
_BYTES, _PATH = b"b", b"p"
# Pixels follow; why the image cannot be used; an error that would hit any
# other image as well; the memory to wait for.
_PIXELS, _BAD, _FATAL, _MEMORY = b"p", b"x", b"f", b"m"


class ImageReaders:
  """Reads images at several sizes; threads share it.

  Args:
    sizes: resize a decoded image.
    scaled: whether large JPEGs are decoded at a fraction of their size; see
      `transforms.resized`.
    number: of processes, which are started when they are needed; 0: images are
      read in the threads that ask for them.
  """

  def __init__(
    self, sizes: Sequence[transforms.EvalImage], scaled: bool, number: int
  ):
    self._sizes, self._scaled, self._number = [*sizes], scaled, number
    self._idle: queue.LifoQueue[_Process] = queue.LifoQueue()
    self._processes = [
      _Process(self._sizes, scaled, number) for _ in range(number)
    ]
    for process in self._processes:
      self._idle.put(process)
    self._lock = threading.Lock()
    self._num_images, self._seconds = 0, 0.0

  def read(
    self, image: object, out: Sequence[UInt8[np.ndarray, "_ _ 3"]]
  ) -> None:
    """Writes an image into an array of each size.

    Raises:
      transforms.BadSample: it cannot be used.
    """
    # Others are decoded already.
    if self._number and isinstance(image, bytes | str):
      process = self._idle.get()
      try:
        seconds = process.read(image, out)
      finally:
        self._idle.put(process)
    else:
      start = time.thread_time()
      read = transforms.resized(
        image, self._sizes, transforms.MAX_PIXELS, self._scaled
      )
      for array, pixels in zip(out, read, strict=True):
        array[...] = pixels
      seconds = time.thread_time() - start
    with self._lock:
      self._num_images += 1
      self._seconds += seconds

  @property
  def images_per_core(self) -> float:
    """Images read per second of processor time; 0.0 before the first."""
    return self._num_images / self._seconds if self._seconds else 0.0

  def close(self) -> None:
    """Ends the processes, also those that are reading an image."""
    for process in self._processes:
      process.close()


class _Process:
  """A process that reads one image at a time, for one thread at a time."""

  def __init__(
    self, sizes: Sequence[transforms.EvalImage], scaled: bool, number: int
  ):
    self._settings = json.dumps(
      {
        "sizes": [size.size for size in sizes],
        "scaled": scaled,
        "memory": image_limits.MAX_MEMORY // number,
      }
    )
    self._child: subprocess.Popen[bytes] | None = None
    self._closed = False
    # Whoever closes it may come while it starts, or while it reads.
    self._starting, self._reading = threading.Lock(), threading.Lock()

  def read(self, image: bytes | str, out: Sequence[np.ndarray]) -> float:
    """Returns the seconds of processor time that it took."""
    status = None
    with self._reading:
      for _ in range(_TRIES):
        if (child := self._started()) is None:
          break
        try:
          return _ask(child, image, out)
        except (EOFError, BrokenPipeError):
          _close(child)
          self._child, status = None, child.wait()
    detail = f"the process that read it ended with the status {status}"
    raise transforms.BadSample("crashed", detail)

  def _started(self) -> "subprocess.Popen[bytes] | None":
    with self._starting:
      if self._child is None and not self._closed:
        self._child = self._start()
      return self._child

  def _start(self) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
      [sys.executable, "-m", __name__, self._settings],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )

  def close(self) -> None:
    """Ends the process; whoever reads an image gets a `BadSample`."""
    with self._starting:
      self._closed = True
      if (child := self._child) is not None:
        child.kill()
    with self._reading:
      if (child := self._child) is not None:
        _close(child)
        child.wait()


def _close(child: "subprocess.Popen[bytes]") -> None:
  for pipe in (child.stdin, child.stdout):
    if pipe is not None:
      with contextlib.suppress(BrokenPipeError):
        pipe.close()


def _ask(
  child: "subprocess.Popen[bytes]",
  image: bytes | str,
  out: Sequence[np.ndarray],
) -> float:
  requests, replies = child.stdin, child.stdout
  assert requests is not None and replies is not None
  kind, content = (
    (_BYTES, image) if isinstance(image, bytes) else (_PATH, os.fsencode(image))
  )
  requests.write(_REQUEST.pack(kind, len(content)))
  requests.write(content)
  requests.flush()
  with contextlib.ExitStack() as held:
    kind, seconds, size = _REPLY.unpack(_received(replies, _REPLY.size))
    if kind == _MEMORY:
      held.enter_context(image_limits.DECODED.reserved(size))
      requests.write(_MEMORY)
      requests.flush()
      kind, seconds, size = _REPLY.unpack(_received(replies, _REPLY.size))
    if kind == _PIXELS:
      for array in out:
        _receive(replies, array.data.cast("B"))
      return seconds
    message = json.loads(_received(replies, size))
  if kind == _BAD:
    raise transforms.BadSample(*message)
  raise OSError(*message)


def _received(file: IO[bytes], size: int) -> bytes:
  content = bytearray(size)
  _receive(file, memoryview(content))
  return bytes(content)


def _receive(file: IO[bytes], view: memoryview) -> None:
  """Fills a buffer without a copy, and without Python's lock."""
  while view:
    size = file.readinto(view)  # pyright: ignore[reportAttributeAccessIssue]
    if not size:
      raise EOFError
    view = view[size:]


class _Memory:
  """In place of `image_limits.DECODED`: the parent says when there is memory.

  It is not asked about images that take no more than an equal share.
  """

  def __init__(self, share: int, requests: IO[bytes], replies: IO[bytes]):
    self._share, self._requests, self._replies = share, requests, replies

  @contextlib.contextmanager
  def reserved(self, amount: int) -> Iterator[None]:
    if amount > self._share:
      self._replies.write(_REPLY.pack(_MEMORY, 0.0, amount))
      self._replies.flush()
      _received(self._requests, len(_MEMORY))
    yield


def main(settings: str) -> None:
  """What a process does."""
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)  # the parent decides
  host.keep_freed_memory()
  requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
  os.dup2(2, 1)  # what libraries print is no reply
  options = json.loads(settings)
  sizes = [
    transforms.EvalImage(size if isinstance(size, int) else tuple(size))
    for size in options["sizes"]
  ]
  image_limits.DECODED = _Memory(options["memory"], requests, replies)
  before = time.process_time()
  with contextlib.suppress(EOFError, BrokenPipeError):
    while True:
      kind, size = _REQUEST.unpack(_received(requests, _REQUEST.size))
      content = _received(requests, size)
      image = content if kind == _BYTES else os.fsdecode(content)
      kind, parts = _reply(image, sizes, options["scaled"])
      now = time.process_time()
      size = sum(map(len, parts))
      replies.write(_REPLY.pack(kind, now - before, size))
      before = now
      for part in parts:
        replies.write(part)
      replies.flush()


def _reply(
  image: bytes | str, sizes: Sequence[transforms.EvalImage], scaled: bool
) -> tuple[bytes, Sequence[bytes | memoryview]]:
  try:
    read = transforms.resized(image, sizes, transforms.MAX_PIXELS, scaled)
    return _PIXELS, [pixels.data.cast("B") for pixels in read]
  except transforms.BadSample as error:
    kind, message = _BAD, (error.reason, error.detail)
  except Exception as error:
    if isinstance(error, OSError) and rejects.hits_all(error):
      kind, message = _FATAL, (error.errno, error.strerror)
    else:
      kind, message = _BAD, ("error", f"{type(error).__name__}: {error}")
  return kind, [json.dumps(message).encode()]


if __name__ == "__main__":
  main(sys.argv[1])
