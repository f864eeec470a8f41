"""Memory of the host: garbage collection, malloc, and pages of large files."""

import atexit
import ctypes
import gc
import io
import os
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
  """Lets malloc keep what a step or an image frees, for the next one.

  A step on CPU allocates and frees blocks of tens of megabytes, and so does the
  decoder of an image.  glibc returns each to the kernel, which zeroes its pages
  before it hands them out again.  That costs half the time of a small model's
  step and a quarter of a JPEG's, and threads wait for each other.  Other
  systems are left as they are.
  """
  if sys.platform == "linux":
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
      mallopt(_M_MMAP_THRESHOLD, _LARGEST)
      mallopt(_M_TRIM_THRESHOLD, _LARGEST)


def keep_imported() -> None:
  """Exempts what is imported so far from garbage collection, and all at exit.

  Modules stay until the end. Each search through them takes up to a third of a
  second, and there are several while programs are traced, and three at exit.
  """
  gc.freeze()
  atexit.register(gc.freeze)


def create_file(path: str | os.PathLike) -> io.BufferedWriter:
  """Opens a new file of gigabytes for writing, to be read another day.

  After every `_PORTION` it syncs to disk and releases the pages.  Otherwise the
  kernel would keep the complete file in memory, and finding so many pages takes
  longer than writing them: on a virtual machine, which returns free pages to
  its host, that was two thirds of a conversion's last step.
  """
  return io.BufferedWriter(_Portions(path, "w"))


_PORTION = 2**27


class _Portions(io.FileIO):
  """A file of which the page cache holds at most `_PORTION`."""

  _kept = 0

  def write(self, data) -> int:
    written = super().write(data)
    self._kept += written
    if self._kept >= _PORTION:
      self._kept = 0
      os.fsync(self.fileno())
      if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return written
