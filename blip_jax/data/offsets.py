"""Byte offsets of the rows of large files: computed once, cached, mapped.

The index of an annotation file of 100 million rows takes eight bytes per row
and no Python object; rows stay in the file and are parsed one by one when they
are read. The same holds for the members of tar shards.
"""

import functools
import hashlib
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Collection, Iterable
from typing import BinaryIO, TypeVar

import numpy as np
from absl import logging
from jaxtyping import Int

from blip_jax.runtime import copies, files

_CHUNK = 1 << 24
# Below this, scanning is faster than looking for a cache, and the user's
# folder stays free of cache files.
MIN_CACHED_BYTES = 1 << 26

T = TypeVar("T")
# Caches, in the state in which they were compared with their checksum.
Checked = frozenset[tuple[str, files.Stat]]
_checked: set[tuple[str, files.Stat]] = set()
_CRC_BYTES = 4

_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
# gzip, bzip2, xz, zstd and zip.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd", b"PK\3\4")
_QUOTE, _NEWLINE, _RETURN = b'"\n\r'


def cached(
  path: str, kind: str, build: Callable[[str], tuple[np.ndarray, list[str]]]
) -> tuple[np.ndarray, list[str]]:
  """Returns `build(path)`: an index, and the damage found while building it.

  The index of a large file is cached, see `cache_path`, and so is that of a
  file in an object store. The index of a damaged file is not: each start must
  report the damage.
  """
  size = files.size(path)
  if size < MIN_CACHED_BYTES and not files.is_remote(path):
    return build(path)
  target = cache_path(path, kind, ".npy")
  if (index := open_cache(target, _open_index)) is not None:
    return index, []
  logging.info("Indexing %s (%.1f GB), once.", path, size / 1e9)
  index, damage = build(path)
  if damage:
    return index, damage
  made = make_cache(target, lambda file: np.save(file, index), _open_index)
  return (index if made is None else made), []


def cache_path(path: str, kind: str, suffix: str) -> pathlib.Path:
  """Returns where data derived from a file is cached.

  That is next to the file, or in `$XDG_CACHE_HOME/blip_jax` if its folder is
  not writable. Size and modification time are part of the name, so a file that
  changes is indexed again.
  """
  stat = files.stat(path)
  file = files.as_path(files.real_path(path))
  name = files.shortened(file.name)
  name = f"{name}.{kind}-{stat.size}-{stat.modified_ns}{suffix}"
  if files.is_writable(file.parent):
    return pathlib.Path(file.parent, f".{name}")
  path_digest = hashlib.sha256(os.fsencode(file)).hexdigest()[:16]
  return copies.cache_folder() / f"{path_digest}.{name}"


def open_cache(
  target: pathlib.Path, open_file: Callable[[pathlib.Path, int], T]
) -> T | None:
  """Opens a file of `make_cache`; None if there is none, or a damaged one.

  All of it is read once by the first process that opens it (about 1.5 GB in a
  second): a power cut may have left zeros in it.

  Args:
    target: from `cache_path`.
    open_file: from path and size of the content to its value.
  """
  if not files.is_file(target):
    return None
  try:
    size = files.size(target) - _CRC_BYTES
    if (state := _state(target)) not in _checked:
      if files.read_range(target, size, _CRC_BYTES) != _crc(target, size):
        raise ValueError("expected content of its checksum, found other")
      _checked.add(state)
    return open_file(target, size)
  except Exception as error:  # NumPy and Arrow raise almost any
    logging.warning("%s: damaged, and made again: %s", target, error)
    return None


def make_cache(
  target: pathlib.Path,
  write: Callable[[BinaryIO], object],
  open_file: Callable[[pathlib.Path, int], T],
) -> T | None:
  """Writes and opens a cache; None, with a warning, if it cannot be written.

  Its checksum follows the content. Files of earlier versions are removed. See
  `open_cache` for the arguments.
  """
  try:
    _write_cache(target, write)
    _checked.add(_state(target))
  except OSError as error:
    if error.errno is None:  # Arrow's, of what is written
      raise
    _warn_of_no_cache(str(target.parent), str(error))
    return None
  return open_cache(target, open_file)


@functools.cache  # once for a folder
def _warn_of_no_cache(folder: str, error: str) -> None:
  logging.warning(
    "%s: no cache can be written, so large files are indexed at every start, "
    "and their indices take memory: %s. Set XDG_CACHE_HOME to a folder that is "
    "writable.",
    files.one_line(folder),
    files.one_line(error),
  )


def _write_cache(
  target: pathlib.Path, write: Callable[[BinaryIO], object]
) -> None:
  files.make_folder(target.parent)
  stem = re.sub(r"\d+-\d+$", "", target.stem)
  outdated = [
    name
    for name in files.list_folder(target.parent)
    if name.startswith(stem) and name.endswith(target.suffix)
  ]
  with files.open_atomic(target) as file:
    write(file)
    file.flush()
    size = file.tell()
    file.write(_crc(pathlib.Path(file.name), size))
  for name in outdated:
    if name != target.name:  # which another process may just have written
      files.remove(target.parent / name)


def _crc(path: pathlib.Path, size: int) -> bytes:
  """CRC-32 of the first bytes of a file, as it is stored behind them."""
  data, crc = np.memmap(path, np.uint8, mode="r", shape=size), 0
  for begin in range(0, size, _CHUNK):
    crc = zlib.crc32(data[begin : begin + _CHUNK].data, crc)
  return crc.to_bytes(_CRC_BYTES, "little")


def _state(target: pathlib.Path) -> tuple[str, files.Stat]:
  return str(target), files.stat(target)


def checked(targets: Collection[pathlib.Path]) -> Checked:
  """Those caches whose checksum was compared, for `trust`."""
  names = {*map(str, targets)}
  return frozenset(state for state in _checked if state[0] in names)


def trust(checked: Checked) -> None:
  """Takes over what the process that started this one has `checked`."""
  _checked.update(checked)


def _open_index(path: pathlib.Path, size: int) -> np.ndarray:
  del size  # in the header, too
  return np.load(path, mmap_mode="r")


def digest(names: Iterable[str]) -> str:
  """Returns a short name for a list of columns, to tell caches apart."""
  return hashlib.sha256("\0".join(names).encode()).hexdigest()[:8]


class Mapped:
  """An index that is pickled by name if it is mapped from a file."""

  def __init__(self, array: np.ndarray):
    self.array = array

  def __getstate__(self):
    # Pickling a memory map would copy all of it into every worker process.
    if isinstance(self.array, np.memmap):
      return str(self.array.filename)
    return self.array

  def __setstate__(self, state):
    if isinstance(state, str):
      state = np.load(state, mmap_mode="r")
    self.array = state


def open_text(
  path: str, blank: bytes | None = None
) -> tuple[np.ndarray, int | None]:
  """Maps a text file; also returns the offset of its first content, or None.

  Args:
    path: of the file; of one in an object store, a copy is mapped.
    blank: bytes that are not content; None: all white space.

  Raises:
    ValueError: the file is compressed, or is UTF-16.
  """
  path = copies.local_copy(path)
  if files.size(path) == 0:  # nothing to map
    return np.zeros(0, np.uint8), None
  data = np.memmap(path, np.uint8, mode="r")
  head = bytes(data[:4096])
  _check_is_text(path, head)
  text = head.removeprefix(_BOM).lstrip(blank)
  return data, len(head) - len(text) if text else None


def is_compressed(head: bytes) -> bool:
  """Whether a file with these first bytes is a compressed one."""
  return head.startswith(_COMPRESSED)


def _check_is_text(path: str, head: bytes) -> None:
  if is_compressed(head):
    raise ValueError(
      f"{path}: expected text, found a compressed file, whose rows cannot be "
      "read one by one. Decompress it, for example with gunzip."
    )
  # Without a mark, every other byte of English is zero.
  has_zeros = head[1:4:2] == b"\0\0" and b"\0" not in head[0:4:2]
  if head.startswith(_UTF_16) or has_zeros:
    raise ValueError(
      f"{path}: expected UTF-8, found UTF-16. Convert it, for example with "
      "iconv -f UTF-16 -t UTF-8."
    )


def line_starts(data: np.ndarray, first: int) -> Int[np.ndarray, "lines"]:
  """Finds the lines of a text that are not empty, from `first` on."""
  starts = [_not_empty(data, np.array([first]))]
  for begin in range(first, len(data), _CHUNK):
    chunk = data[begin : begin + _CHUNK]
    ends = np.flatnonzero(chunk == _NEWLINE) + begin
    starts.append(_not_empty(data, ends + 1))
  return np.concatenate(starts)


def _not_empty(
  data: np.ndarray, starts: Int[np.ndarray, "n"]
) -> Int[np.ndarray, "lines"]:
  starts = starts[starts < len(data)]
  return starts[~np.isin(data[starts], (_NEWLINE, _RETURN))]


def odd_quotes(
  data: np.ndarray, starts: Int[np.ndarray, "lines"]
) -> Int[np.ndarray, "n"]:
  """Returns which lines (of `line_starts`) have an odd number of quotes."""
  odd = np.zeros(len(starts), bool)
  for begin in range(0, len(data), _CHUNK):
    chunk = data[begin : begin + _CHUNK]
    quotes = np.flatnonzero(chunk == _QUOTE) + begin
    if quotes.size:
      lines = np.searchsorted(starts, quotes, side="right") - 1
      counts = np.bincount(lines - lines[0])
      odd[lines[0] : lines[-1] + 1] ^= counts % 2 == 1
  return np.flatnonzero(odd)


def glimpse(data: np.ndarray, first: int | None) -> str:
  """Returns the beginning of a text, for errors."""
  return "nothing" if first is None else repr(bytes(data[first : first + 40]))
