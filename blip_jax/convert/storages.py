"""Bytes of a checkpoint's file, read when a tensor is used."""

import dataclasses
import functools
import mmap
import pathlib
import zlib
from typing import BinaryIO

FETCH_AGAIN = "compare its size with the one at its source, and fetch it again"


@dataclasses.dataclass(frozen=True)
class Storage:
  """Bytes of a file, of which tensors are views."""

  path: pathlib.Path
  file: BinaryIO
  name: str
  start: int
  stored: int
  size: int
  deflated: bool = False
  crc32: int = 0  # 0 if there is none, as in all safetensors files

  def buffer(self) -> memoryview | bytes:
    """The content; raises `ValueError` if it is damaged."""
    if not self._is_sound:
      raise damaged(self.path, f"{self.name}: its CRC-32 is another")
    return self._content()

  # Many tensors may be views of one storage, which is compared once.
  @functools.cached_property
  def _is_sound(self) -> bool:
    return not self.crc32 or zlib.crc32(self._content()) == self.crc32

  def _content(self) -> memoryview | bytes:
    if not self.stored:
      return b""
    # Each storage has its own mapping, which is released with its array: a
    # model is read without ever being in memory twice.
    before = self.start % mmap.ALLOCATIONGRANULARITY
    mapped = mmap.mmap(
      self.file.fileno(),
      before + self.stored,
      access=mmap.ACCESS_READ,
      offset=self.start - before,
    )
    stored = memoryview(mapped)[before:]
    if not self.deflated:
      return stored
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
      # One byte more than declared, to notice a larger content.
      content = inflater.decompress(stored, self.size + 1)
    except zlib.error as error:
      raise damaged(self.path, f"{self.name}: {error}") from error
    if len(content) != self.size:
      raise damaged(self.path, f"{self.name} does not inflate to {self.size}")
    return content


def damaged(path: pathlib.Path, why: str) -> ValueError:
  """The error of a file that no program has written like this."""
  return ValueError(
    f"{path} is damaged or malicious: {why:.300} "
    f"(nothing in it was executed); {FETCH_AGAIN}"
  )
