"""The host's own memory: of steps on CPU, and of files as large as it."""

import ctypes
import io
import os
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
  """Lets malloc keep what a step or a picture frees, for the next one.

  A step on CPU takes and gives back blocks of tens of megabytes, and a decoder
  some for each picture.  glibc returns each to the kernel, which hands it out
  again page by page, zeroed: half the time of a small model's step, a quarter
  of a JPEG's, in a process whose threads wait for each other at that.  Other
  systems are left as they are.
  """
  if sys.platform == "linux":
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
      mallopt(_M_MMAP_THRESHOLD, _LARGEST)
      mallopt(_M_TRIM_THRESHOLD, _LARGEST)


def create_file(path: str | os.PathLike) -> io.BufferedWriter:
  """Opens a new file of gigabytes for writing, to be read another day.

  Every `_PORTION` it brings its bytes to disk and gives up their pages.  The
  kernel would keep the whole file in memory otherwise, and to find so many
  pages takes longer than to write them: on a virtual machine, which hands free
  pages back to its host, two thirds of a conversion's last step.
  """
  return io.BufferedWriter(_Portions(path, "w"))


_PORTION = 2**27


class _Portions(io.FileIO):
  """A file of which the kernel never keeps more than `_PORTION`."""

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
