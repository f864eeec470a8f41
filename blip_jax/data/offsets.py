"""Where every row of a big file lies: found once, cached, memory-mapped.

An annotation file of 100 million rows costs eight bytes per row here and no
Python object; the rows themselves stay in the file and are parsed one by one
when they are asked for. The same holds for the members of tar shards.
"""

import glob
import hashlib
import os
import pathlib
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
from absl import logging
from jaxtyping import Bool, Int

_CHUNK = 1 << 24
# Below this, scanning is quicker than looking for a cache, and the user's
# folder stays free of our files.
MIN_CACHED_BYTES = 1 << 26

_BOM = b"\xef\xbb\xbf"
_QUOTE, _BACKSLASH, _NEWLINE, _RETURN = b'"\\\n\r'
_OPEN_LIST, _CLOSE_LIST = b"[]"
_STRUCTURE = np.isin(np.arange(256), np.frombuffer(b'"{}[]', np.uint8))
_STEP = np.zeros(256, np.int64)
_STEP[list(b"{[")], _STEP[list(b"}]")] = 1, -1

# What is read from a tar shard. Anything else, pickles above all, is never
# opened. As in webdataset, a name is split at its first dot.
PARTS = {
  "jpg": "image",
  "jpeg": "image",
  "png": "image",
  "webp": "image",
  "txt": "text",
  "json": "json",
}


def read_span(path: str, offset: int, size: int) -> bytes:
  """Return up to `size` bytes of a file from `offset`.

  The file is opened each time: thousands of shards would otherwise run into
  the limit of open files, and sources would not pickle.
  """
  with open(path, "rb", buffering=0) as file:
    return os.pread(file.fileno(), size, offset)


def cached(
  path: str, kind: str, build: Callable[[str], tuple[np.ndarray, list[str]]]
) -> tuple[np.ndarray, list[str]]:
  """Return `build(path)`, an index and the damage found while building it.

  The index of a large file is kept, see `cache_path`. The index of a damaged
  file is not: each start must report the damage.
  """
  size = os.path.getsize(path)
  if size < MIN_CACHED_BYTES:
    return build(path)
  target = cache_path(path, kind, ".npy")
  if target.exists():
    return np.load(target, mmap_mode="r"), []
  logging.info("Indexing %s (%.1f GB), once.", path, size / 1e9)
  index, damage = build(path)
  if damage:
    return index, damage
  write_cache(target, lambda file: np.save(file, index))
  return np.load(target, mmap_mode="r"), []


def cache_path(path: str, kind: str, suffix: str) -> pathlib.Path:
  """Return where something that was found out about a file is kept.

  That is beside the file, or in `$XDG_CACHE_HOME/blip_jax` where its folder
  cannot be written. Size and time of modification are part of the name, so a
  changed file is looked at again.
  """
  stat = os.stat(path)
  file = pathlib.Path(path).resolve()
  name = f"{file.name}.{kind}-{stat.st_size}-{stat.st_mtime_ns}{suffix}"
  if os.access(file.parent, os.W_OK):
    return file.parent / f".{name}"
  root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  digest = hashlib.sha256(os.fsencode(file)).hexdigest()[:16]
  return pathlib.Path(root) / "blip_jax" / f"{digest}.{name}"


def write_cache(
  target: pathlib.Path, write: Callable[[BinaryIO], object]
) -> None:
  """Make a file of `cache_path`; those of earlier states go."""
  stem = re.sub(r"\d+-\d+$", "", target.stem)
  target.parent.mkdir(parents=True, exist_ok=True)
  handle, name = tempfile.mkstemp(dir=target.parent, prefix=stem, suffix=".tmp")
  try:
    with os.fdopen(handle, "wb") as file:
      write(file)
  except BaseException:  # a full disk, or the user's patience
    os.unlink(name)
    raise
  # Temporary files are private; those beside shared data are for all.
  os.chmod(name, 0o644)
  for outdated in target.parent.glob(f"{glob.escape(stem)}*{target.suffix}"):
    outdated.unlink(missing_ok=True)
  # Another process may be doing the same: whole files only, last one wins.
  os.replace(name, target)


class Mapped:
  """An index that travels to worker processes by name if it lies in a file."""

  def __init__(self, array: np.ndarray):
    self.array = array

  def __getstate__(self):
    # Pickling a memory map would copy all of it into every worker.
    if isinstance(self.array, np.memmap):
      return str(self.array.filename)
    return self.array

  def __setstate__(self, state):
    if isinstance(state, str):
      state = np.load(state, mmap_mode="r")
    self.array = state


def json_rows(path: str) -> tuple[Int[np.ndarray, "offsets"], list[str]]:
  """Find the rows of a JSON list of objects.

  Row `i` lies between offsets `i` and `i + 1`, with the comma that follows it;
  the last offset is that of the closing bracket. Only quotes and brackets are
  looked at: whether a row is valid JSON shows when it is read.

  Raises:
    ValueError: the file is no list, is empty, or ends before the list does.
  """
  data, first = open_text(path)
  if first is None or data[first] != _OPEN_LIST:
    raise ValueError(
      f"{path}: expected a JSON list of rows ('['), found "
      f"{_glimpse(data, first)}. One row per line belongs into a .jsonl file."
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
      raise ValueError(f"{path}: there is more after the list's end ({end}).")
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
  """Find the rows of a file with one JSON object per line; see `json_rows`.

  Empty lines are no rows.

  Raises:
    ValueError: the file holds no rows, or is a JSON list.
  """
  data, first = open_text(path)
  if first is None or data[first] == _OPEN_LIST:
    raise ValueError(
      f"{path}: expected one JSON object per line, found "
      f"{_glimpse(data, first)}. A JSON list belongs into a .json file."
    )
  return np.append(line_starts(data, first), len(data)), []


def open_text(
  path: str, blank: bytes | None = None
) -> tuple[np.ndarray, int | None]:
  """Map a text file; also return where its first visible character is.

  Args:
    blank: what is not visible; None: all white space.
  """
  if os.path.getsize(path) == 0:  # nothing to map
    return np.zeros(0, np.uint8), None
  data = np.memmap(path, np.uint8, mode="r")
  head = bytes(data[:4096])
  text = head.removeprefix(_BOM).lstrip(blank)
  return data, len(head) - len(text) if text else None


def line_starts(data: np.ndarray, first: int) -> Int[np.ndarray, "lines"]:
  """Find the lines of a text that are not empty, from `first` on."""
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
  """Which lines (of `line_starts`) have an odd number of quotes."""
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
  """Yield places and values of quotes and brackets, chunk by chunk."""
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
  """Whether an odd number of backslashes stands before each mark."""
  odd = np.zeros(len(marks), bool)
  left = np.arange(len(marks))
  back = 1
  while left.size:
    left = left[marks[left] >= back]
    left = left[data[marks[left] - back] == _BACKSLASH]
    odd[left] ^= True
    back += 1
  return odd


def tar_samples(path: str) -> tuple[np.ndarray, list[str]]:
  """Find the samples of a tar shard: members that share a name up to a dot.

  Only headers are read. After damage the scan goes on at the next sound
  header, so that the samples behind it are kept as well.

  Returns:
    A structured array with `key` and, for image, text and json, offset and
    size in bytes (-1 where the sample has none); and a list of what is
    damaged.
  """
  samples: dict[str, dict[str, tuple[int, int]]] = {}
  damage = []
  for member in _tar_members(path, damage):
    folder, _, name = member.name.rpartition("/")
    stem, _, extension = name.partition(".")
    part = PARTS.get(extension.lower())
    if part is None or not member.isreg() or member.issparse():
      continue
    key = f"{folder}/{stem}" if folder else stem
    sample = samples.setdefault(key, {})
    if part in sample:
      damage.append(f"{path}: {member.name}: a second {part} of {key!r}")
      continue
    sample[part] = (member.offset_data, member.size)
  keys = [os.fsencode(key) for key in samples]
  parts = ("image", "text", "json")
  index = np.full(
    len(keys),
    -1,
    [("key", f"S{max(map(len, keys), default=1)}")]
    + [(part, np.int64, 2) for part in parts],
  )
  index["key"] = keys
  for part in parts:
    for row, sample in enumerate(samples.values()):
      index[part][row] = sample.get(part, (-1, -1))
  if not len(index):
    damage.append(f"{path}: no pictures or captions found")
  return index, damage


def _tar_members(path: str, damage: list[str]) -> Iterator[tarfile.TarInfo]:
  """Yield the members that are whole, and add to `damage` what is not."""
  size = os.path.getsize(path)
  end = 0
  try:
    # Unless told to ignore zeros, tarfile takes a bad header for the end.
    with tarfile.open(path, "r:", ignore_zeros=True) as tar:
      while member := tar.next():
        tar.members.clear()  # one object per member, kept for nothing
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
    if any(read_span(path, at, min(_CHUNK, end - at))):
      damage.append(f"{path}: bytes {begin} to {end} are no tar members")
      return
