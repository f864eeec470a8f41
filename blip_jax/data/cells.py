"""The values of single cells: captions, and ids of images.

Any of them may be absent, NaN (as pandas writes an empty cell) or of another
type. That costs its row.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from blip_jax.data import sources
from blip_jax.runtime import files

# Where a caption in a list is an object. Karpathy's have `raw` and `tokens`.
TEXTS = ("raw", "caption", "text")

# Above this a float no longer tells neighbouring numbers apart.
_MAX_EXACT_FLOAT = 2**53


def first(names: Iterable[str], columns: Collection[str]) -> str | None:
  """The first name that is among the columns."""
  return next((name for name in names if name in columns), None)


def is_missing(value: Any) -> bool:
  """Whether a cell is empty: null, NaN, or text of only white space."""
  if isinstance(value, str):
    return not value.strip()
  is_float = isinstance(value, (float, np.floating))
  return value is None or (is_float and math.isnan(value))


def caption(value: Any, id: str, where: str) -> str | bytes | list[str | bytes]:
  """Returns a caption, text or a list of texts, from a row's value.

  An object in a list, as in Karpathy's `sentences`, stands for its `raw`,
  `caption` or `text`. Null or NaN in a list is "", which costs only itself; see
  `sources.usable_captions`.

  Raises:
    BadRow: there is no caption, or a value that is no text.
  """
  if isinstance(value, (np.ndarray, np.generic)):
    value = value.tolist()
  if value == [] or (is_missing(value) and not isinstance(value, str)):
    detail = f"{where}: expected text, found {value}"
    raise sources.BadRow(id, "empty_caption", detail)
  if not isinstance(value, list):
    return _text(value, id, where)
  values = [_plain(each) for each in value]
  if any(isinstance(each, (str, bytes)) for each in values):
    values = ["" if is_missing(each) else each for each in values]
  return [_text(each, id, where) for each in values]


def _plain(value: Any) -> Any:
  """The value of an object's text; another value as it is."""
  key = first(TEXTS, value) if isinstance(value, Mapping) else None
  return value[key] if key else value


def _text(value: Any, id: str, where: str) -> str | bytes:
  value = _plain(value)
  if not isinstance(value, (str, bytes)):
    raise mistake(id, where, "text", value)
  return value


def image_id(value: Any, id: str, where: str) -> int | str | None:
  """Returns an `image_id` from a row's value; None if the cell is empty.

  A whole float becomes an int: pandas makes floats of a column of numbers as
  soon as one is missing. Text is as `files.printable` writes it.

  Raises:
    BadRow: the value identifies no image.
  """
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, bytes):
    value = value.decode("utf-8", "surrogateescape")
  if is_missing(value):
    return None
  if isinstance(value, float) and abs(value) < _MAX_EXACT_FLOAT:
    value = int(value) if value.is_integer() else value
  is_bool = isinstance(value, bool)
  if not isinstance(value, (int, str)) or is_bool or len(str(value)) > 1000:
    raise mistake(id, where, "an int or at most 1,000 characters", value)
  return files.printable(value) if isinstance(value, str) else value


def mistake(id: str, where: str, expected: str, found: Any) -> sources.BadRow:
  """The error of a cell of another type."""
  detail = f"{where}: expected {expected}, found {found!r:.200}"
  return sources.BadRow(id, "broken_row", detail)
