"""Where the rows of JSON files are, found without parsing them.

Only quotes, brackets and commas are examined: whether a row is valid JSON, and
an object, is checked when it is read.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int

from blip_jax.data import offsets, sources

_CHUNK = 1 << 24
_QUOTE, _BACKSLASH, _COMMA, _SPACE, _TAB = b'"\\, \t'
_OPEN_LIST, _OPEN_OBJECT = b"[{"
_STRUCTURE = np.isin(np.arange(256), np.frombuffer(b'"{}[],', np.uint8))
_STEP = np.zeros(256, np.int64)
_STEP[list(b"{[")], _STEP[list(b"}]")] = 1, -1
# Longer runs of backslashes are counted in blocks that grow, not one by one.
_MAX_STEPS, _BLOCK = 64, 256
_MAX_KEY_BYTES = 1000


def is_object(path: str) -> bool:
  """Whether a JSON file is one object, or begins with one."""
  data, first = offsets.open_text(path)
  return first is not None and bool(data[first] == _OPEN_OBJECT)


def list_rows(path: str) -> tuple[Int[np.ndarray, "offsets"], list[str]]:
  """Finds the rows of a JSON list.

  Row `i` is between offsets `i` and `i + 1`, including the comma that follows
  it; the last offset is that of the closing bracket. A comma after the last
  row is no mistake.

  Returns:
    The offsets in bytes, one more than there are rows; and no damage.

  Raises:
    ValueError: the file is not a list, is empty, or ends before the list does.
  """
  data, first = offsets.open_text(path)
  if first is None or data[first] != _OPEN_LIST:
    raise ValueError(
      f"{path}: expected a JSON list of rows ('['), found "
      f"{offsets.glimpse(data, first)}. Name a file with one row per line "
      ".jsonl."
    )
  marks, _ = _boundaries(path, data, depth=1)
  rows = _rows(data, marks)
  if len(rows) < 2:
    raise ValueError(f"{path}: expected a JSON list of rows, found none.")
  return rows, []


def line_rows(path: str) -> tuple[Int[np.ndarray, "offsets"], list[str]]:
  """Finds the rows of a file with one JSON object per line.

  Row `i` is between offsets `i` and `i + 1`. Blank lines are skipped.

  Returns:
    The offsets in bytes, one more than there are rows; and no damage.

  Raises:
    ValueError: the file has no rows, or is a JSON list.
  """
  data, first = offsets.open_text(path)
  if first is None or data[first] == _OPEN_LIST:
    raise ValueError(
      f"{path}: expected one JSON object per line, found "
      f"{offsets.glimpse(data, first)}. Name a file with a JSON list .json."
    )
  lines = offsets.line_starts(data, first)
  bounds = np.append(lines, len(data))
  kept = np.ones(len(bounds), bool)
  for line in np.flatnonzero(np.isin(data[lines], (_SPACE, _TAB))):
    kept[line] = not _is_blank(data, *bounds[line : line + 2].tolist())
  return bounds[kept], []


def lists(path: str, depth: int = 2) -> dict[str, Int[np.ndarray, "offsets"]]:
  """Finds the rows of the lists in a JSON object, by key; see `list_rows`.

  Args:
    path: of the file.
    depth: of the lists; 2: they are values of the object, 3: values of an
      object in it.

  Raises:
    ValueError: the file is not one object, or ends before the object does.
  """
  data, first = offsets.open_text(path)
  if first is None or data[first] != _OPEN_OBJECT:
    raise ValueError(
      f"{path}: expected a JSON object ('{{'), found "
      f"{offsets.glimpse(data, first)}."
    )
  marks, symbols = _boundaries(path, data, depth)
  bounds = {}
  opens = np.flatnonzero(_STEP[symbols] == 1)
  closes = np.flatnonzero(_STEP[symbols] == -1)
  # Containers of one depth are not in each other: the next bracket closes.
  ends = closes[np.searchsorted(closes, opens)]
  for begin, end in zip(opens, ends, strict=True):
    at = int(marks[begin])
    key = _key(bytes(data[max(at - _MAX_KEY_BYTES, 0) : at]))
    if symbols[begin] == _OPEN_LIST and key is not None:
      bounds[key.decode("utf-8", "replace")] = slice(begin, end + 1)
  return {key: _rows(data, marks[span]) for key, span in bounds.items()}


def object_rows(path: str) -> Int[np.ndarray, "offsets"]:
  """Finds the members of a JSON object, `"key": value`; see `list_rows`.

  Raises:
    ValueError: the file is not one object, or ends before the object does.
  """
  data, _ = offsets.open_text(path)
  marks, _ = _boundaries(path, data, depth=1)
  return _rows(data, marks)


def _key(before: bytes) -> bytes | None:
  """The key of a value, from what precedes the value; None if there is none."""
  before = before.rstrip()
  key = before.removesuffix(b":").rstrip()
  if key == before or not key.endswith(b'"'):
    return None
  start = end = len(key) - 1
  while (start := key.rfind(b'"', 0, start)) >= 0:
    backslashes = start - len(key[:start].rstrip(b"\\"))
    if backslashes % 2 == 0:
      return key[start + 1 : end]
  return None


def _is_blank(data: np.ndarray, start: int, end: int) -> bool:
  """Whether there is only white space; a row too long to be read is none."""
  is_short = end - start <= sources.MAX_ROW_BYTES
  return is_short and not bytes(data[start:end]).strip()


def _rows(
  data: np.ndarray, marks: Int[np.ndarray, "n"]
) -> Int[np.ndarray, "offsets"]:
  """From a list's brackets and commas to the offsets of its rows."""
  end = marks[-1]
  starts = marks[:-1] + 1
  if _is_blank(data, int(starts[-1]), int(end)):
    starts = starts[:-1]
  return np.append(starts, end)


def _boundaries(
  path: str, data: np.ndarray, depth: int
) -> tuple[Int[np.ndarray, "n"], np.ndarray]:
  """Finds the brackets of containers at a depth, and the commas in them.

  Returns:
    Offsets and values of the characters: for each container the opening
    bracket, its commas and the closing bracket; then those that close what
    they are in.
  """
  kept_marks, kept_symbols = [], []
  level, in_string, end = 0, False, None
  for marks, symbols in _structure(data):
    quotes = symbols == _QUOTE
    inside = (np.cumsum(quotes) + in_string) % 2 == 1
    in_string = bool(inside[-1])
    outside = ~inside & ~quotes
    marks, symbols = marks[outside], symbols[outside]
    steps = _STEP[symbols]
    levels = level + np.cumsum(steps)
    if end is None and (closed := np.flatnonzero(levels == 0)).size:
      end = int(marks[closed[0]])
    if end is not None and marks.size and marks[-1] > end:
      raise ValueError(
        f"{path}: there is more after the end of the list or object (byte "
        f"{end}). Name a file with one row per line .jsonl."
      )
    kept = np.where(steps == -1, levels < depth, levels == depth)
    kept_marks.append(marks[kept])
    kept_symbols.append(symbols[kept])
    level = int(levels[-1]) if levels.size else level
  marks, symbols = np.concatenate(kept_marks), np.concatenate(kept_symbols)
  if end is None:
    opens = np.flatnonzero(_STEP[symbols] == 1)
    last = "its beginning"
    if opens.size:
      last = f"row {len(marks) - 1 - opens[-1]} (byte {marks[-1] + 1})"
    raise ValueError(
      f"{path}: expected a closing bracket at the end, found the end of the "
      f"file (byte {len(data)}) in or after {last}. The file is truncated, or "
      "a quote in that row is not closed."
    )
  return marks, symbols


def _structure(
  data: np.ndarray,
) -> Iterator[tuple[Int[np.ndarray, "n"], np.ndarray]]:
  """Yields offsets and values of quotes, brackets and commas, in chunks."""
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
  while left.size and back <= _MAX_STEPS:
    left = left[marks[left] >= back]
    left = left[data[marks[left] - back] == _BACKSLASH]
    odd[left] ^= True
    back += 1
  for mark in left.tolist():
    odd[mark] = _backslashes(data, int(marks[mark])) % 2 == 1
  return odd


def _backslashes(data: np.ndarray, end: int) -> int:
  """Returns how many backslashes end at an offset."""
  start, size = end, _BLOCK
  while start > 0:
    block = data[max(start - size, 0) : start]
    others = np.flatnonzero(block != _BACKSLASH)
    if others.size:
      return end - (start - len(block) + int(others[-1]) + 1)
    start, size = start - len(block), min(2 * size, _CHUNK)
  return end
