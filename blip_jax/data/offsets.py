"""Byte offsets of the rows of large files: computed once, cached, mapped.

The index of an annotation file of 100 million rows takes eight bytes per row
and no Python object; rows stay in the file and are parsed one by one when they
are read. The same holds for the members of tar shards.
"""

import hashlib
import os
import pathlib
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

import numpy as np
from absl import logging
from jaxtyping import Bool, Int

from blip_jax.runtime import files

_CHUNK = 1 << 24
# Below this, scanning is faster than looking for a cache, and the user's
# folder stays free of cache files.
MIN_CACHED_BYTES = 1 << 26

_BOM = b"\xef\xbb\xbf"
_QUOTE, _BACKSLASH, _NEWLINE, _RETURN = b'"\\\n\r'
_OPEN_LIST, _CLOSE_LIST = b"[]"
_STRUCTURE = np.isin(np.arange(256), np.frombuffer(b'"{}[]', np.uint8))
_STEP = np.zeros(256, np.int64)
_STEP[list(b"{[")], _STEP[list(b"}]")] = 1, -1

# What is read from a tar shard by default. Anything else, pickles above all,
# is not. As in webdataset, a name is split at its first dot.
PARTS = {
  "jpg": "image",
  "jpeg": "image",
  "png": "image",
  "webp": "image",
  "txt": "text",
  "json": "json",
}


def cached(
  path: str, kind: str, build: Callable[[str], tuple[np.ndarray, list[str]]]
) -> tuple[np.ndarray, list[str]]:
  """Returns `build(path)`: an index, and the damage found while building it.

  The index of a large file is cached, see `cache_path`. The index of a damaged
  file is not: each start must report the damage.
  """
  size = files.size(path)
  if size < MIN_CACHED_BYTES:
    return build(path)
  target = cache_path(path, kind, ".npy")
  if files.exists(target):
    return np.load(target, mmap_mode="r"), []
  logging.info("Indexing %s (%.1f GB), once.", path, size / 1e9)
  index, damage = build(path)
  if damage:
    return index, damage
  write_cache(target, lambda file: np.save(file, index))
  return np.load(target, mmap_mode="r"), []


def cache_path(path: str, kind: str, suffix: str) -> pathlib.Path:
  """Returns where data derived from a file is cached.

  That is next to the file, or in `$XDG_CACHE_HOME/blip_jax` if its folder is
  not writable. Size and modification time are part of the name, so a file that
  changes is indexed again.
  """
  stat = files.stat(path)
  file = pathlib.Path(files.real_path(path))
  name = files.shortened(file.name)
  name = f"{name}.{kind}-{stat.size}-{stat.modified_ns}{suffix}"
  if files.is_writable(file.parent):
    return file.parent / f".{name}"
  root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  path_digest = hashlib.sha256(os.fsencode(file)).hexdigest()[:16]
  return pathlib.Path(root) / "blip_jax" / f"{path_digest}.{name}"


def write_cache(
  target: pathlib.Path, write: Callable[[BinaryIO], object]
) -> None:
  """Writes a file of `cache_path` and removes those of earlier versions."""
  files.make_folder(target.parent)
  stem = re.sub(r"\d+-\d+$", "", target.stem)
  outdated = [
    name
    for name in files.list_folder(target.parent)
    if name.startswith(stem) and name.endswith(target.suffix)
  ]
  with files.open_atomic(target) as file:
    write(file)
  for name in outdated:
    if name != target.name:  # which another process may just have written
      files.remove(target.parent / name)


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


def json_rows(path: str) -> tuple[Int[np.ndarray, "offsets"], list[str]]:
  """Finds the rows of a JSON list of objects.

  Row `i` is between offsets `i` and `i + 1`, including the comma that follows
  it; the last offset is that of the closing bracket. Only quotes and brackets
  are examined: whether a row is valid JSON is checked when it is read.

  Returns:
    The offsets in bytes, one more than there are rows; and no damage.

  Raises:
    ValueError: the file is not a list, is empty, or ends before the list does.
  """
  data, first = open_text(path)
  if first is None or data[first] != _OPEN_LIST:
    raise ValueError(
      f"{path}: expected a JSON list of rows ('['), found "
      f"{_glimpse(data, first)}. Name a file with one row per line .jsonl."
    )
  starts, depth, in_string, end = [], 0, False, None
  for marks, symbols in _structure(data):
    quotes = symbols == _QUOTE
    inside = (np.cumsum(quotes) + in_string) % 2 == 1
    in_string = bool(inside[-1])
    outside = ~inside & ~quotes
    marks, steps = marks[outside], _STEP[symbols[outside]]
    depths = depth + np.cumsum(steps)
    if end is None and (closed := np.flatnonzero(depths == 0)).size:
      end = int(marks[closed[0]])
    if end is not None and marks.size and marks[-1] > end:
      raise ValueError(
        f"{path}: there is more after the list's end (byte {end})."
      )
    starts.append(marks[(steps == 1) & (depths == 2)])
    depth = int(depths[-1]) if depths.size else depth
  rows = np.concatenate(starts) if starts else np.zeros(0, np.int64)
  if end is None:
    last = f"row {len(rows) - 1} (byte {rows[-1]})" if len(rows) else "'['"
    raise ValueError(
      f"{path}: expected ']' at the end, found the end of the file (byte "
      f"{len(data)}) in or after {last}. The file is truncated, or a quote in "
      "that row is not closed."
    )
  if not len(rows) or bytes(data[first + 1 : rows[0]]).strip():
    raise ValueError(
      f"{path}: row 0: expected an object ('{{'), found "
      f"{_glimpse(data, first + 1)}."
    )
  return np.append(rows, end), []


def jsonl_rows(path: str) -> tuple[Int[np.ndarray, "offsets"], list[str]]:
  """Finds the rows of a file with one JSON object per line; see `json_rows`.

  Empty lines are skipped.

  Raises:
    ValueError: the file has no rows, or is a JSON list.
  """
  data, first = open_text(path)
  if first is None or data[first] == _OPEN_LIST:
    raise ValueError(
      f"{path}: expected one JSON object per line, found "
      f"{_glimpse(data, first)}. Name a file with a JSON list .json."
    )
  return np.append(line_starts(data, first), len(data)), []


def open_text(
  path: str, blank: bytes | None = None
) -> tuple[np.ndarray, int | None]:
  """Maps a text file; also returns the offset of its first content, or None.

  Args:
    blank: bytes that are not content; None: all white space.
  """
  if files.size(path) == 0:  # nothing to map
    return np.zeros(0, np.uint8), None
  data = np.memmap(path, np.uint8, mode="r")
  head = bytes(data[:4096])
  text = head.removeprefix(_BOM).lstrip(blank)
  return data, len(head) - len(text) if text else None


def line_starts(data: np.ndarray, first: int) -> Int[np.ndarray, "lines"]:
  """Finds the lines of a text that are not empty, from `first` on."""
  starts = [np.array([first])]
  for begin in range(first, len(data), _CHUNK):
    chunk = data[begin : begin + _CHUNK]
    starts.append(np.flatnonzero(chunk == _NEWLINE) + begin + 1)
  lines = np.concatenate(starts)
  lines = lines[lines < len(data)]
  return lines[~np.isin(data[lines], (_NEWLINE, _RETURN))]


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


def _glimpse(data: np.ndarray, first: int | None) -> str:
  return "nothing" if first is None else repr(bytes(data[first : first + 40]))


def _structure(
  data: np.ndarray,
) -> Iterator[tuple[Int[np.ndarray, "n"], np.ndarray]]:
  """Yields offsets and values of quotes and brackets, chunk by chunk."""
  for begin in range(0, len(data), _CHUNK):
    marks = np.flatnonzero(_STRUCTURE[data[begin : begin + _CHUNK]]) + begin
    symbols = data[marks]
    quotes = np.flatnonzero(symbols == _QUOTE)
    kept = np.ones(len(marks), bool)
    kept[quotes] = ~_escaped(data, marks[quotes])
    if kept.any():
      yield marks[kept], symbols[kept]


def _escaped(
  data: np.ndarray, marks: Int[np.ndarray, "n"]
) -> Bool[np.ndarray, "n"]:
  """Returns whether an odd number of backslashes precedes each mark."""
  odd = np.zeros(len(marks), bool)
  left = np.arange(len(marks))
  back = 1
  while left.size:
    left = left[marks[left] >= back]
    left = left[data[marks[left] - back] == _BACKSLASH]
    odd[left] ^= True
    back += 1
  return odd


def member_field(ending: str) -> str:
  """Returns the field of `tar_samples` for members with an ending."""
  return f"member:{ending.lower()}"


def tar_samples(
  path: str, keep: Iterable[str] = ()
) -> tuple[np.ndarray, list[str]]:
  """Finds the samples of a tar shard: members that share a name up to a dot.

  Only headers are read. After damage the scan continues at the next valid
  header, so that the samples after it are kept as well.

  Args:
    keep: endings of further members to find. They make no sample of their own.

  Returns:
    A structured array with `key` and, for image, text, json and each
    `member_field` of `keep`, offset and size in bytes (-1 where the sample has
    none); and a list of damage.
  """
  samples: dict[str, dict[str, tuple[int, int]]] = {}
  kept: dict[str, dict[str, tuple[int, int]]] = {}
  kept_fields = {member_field(ending): None for ending in keep}  # ordered
  damage = []
  for member in _tar_members(path, damage):
    key, ending = _split_name(member.name)
    part = PARTS.get(ending.lower())
    field = member_field(ending)
    if not member.isreg() or member.issparse():
      continue
    span = (member.offset_data, member.size)
    if field in kept_fields:
      kept.setdefault(key, {}).setdefault(field, span)
    if part is None:
      continue
    sample = samples.setdefault(key, {})
    if part in sample:
      damage.append(f"{path}: {member.name}: a second {part} of {key!r}")
      continue
    sample[part] = span
  keys = [os.fsencode(key) for key in samples]
  fields = ("image", "text", "json", *kept_fields)
  index = np.full(
    len(keys),
    -1,
    [("key", f"S{max(map(len, keys), default=1)}")]
    + [(field, np.int64, 2) for field in fields],
  )
  index["key"] = keys
  for row, (key, sample) in enumerate(samples.items()):
    for field, span in (sample | kept.get(key, {})).items():
      index[field][row] = span
  if not len(index):
    damage.append(f"{path}: no images or captions found")
  return index, damage


def tar_endings(path: str) -> list[str]:
  """Returns the endings of a shard's members, each once."""
  names = (member.name for member in _tar_members(path, []))
  return list(dict.fromkeys(_split_name(name)[1] for name in names))


def _split_name(name: str) -> tuple[str, str]:
  """Returns the key of a member's sample and the member's ending."""
  folder, _, name = name.rpartition("/")
  stem, _, ending = name.partition(".")
  return f"{folder}/{stem}" if folder else stem, ending


def _tar_members(path: str, damage: list[str]) -> Iterator[tarfile.TarInfo]:
  """Yields the intact members, and adds to `damage` what is not intact."""
  size = files.size(path)
  end = 0
  try:
    # Without `ignore_zeros`, tarfile takes a bad header for the end.
    with (
      files.open_read(path) as file,
      tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar,
    ):
      while member := tar.next():
        # tarfile keeps an object for every member here, which type stubs of
        # it do not list.
        vars(tar)["members"].clear()
        _report_gap(path, end, member.offset, damage)
        end = tar.offset
        if member.offset_data + member.size > size:
          damage.append(f"{path}: {member.name}: truncated")
          return
        yield member
  except tarfile.ReadError as error:
    damage.append(f"{path}: after byte {end}: {error}")
    return
  _report_gap(path, end, size, damage)


def _report_gap(path: str, begin: int, end: int, damage: list[str]) -> None:
  for at in range(begin, end, _CHUNK):
    if any(files.read_range(path, at, min(_CHUNK, end - at))):
      damage.append(f"{path}: bytes {begin} to {end} are not tar members")
      return
