"""Small files of others, read safely: JSON of a known shape, and lines.

Every fault is a `ValueError` that names the file and the key: files that are
cut, nested too deeply, too large or no files at all, keys that are there twice,
and values of another type than expected.

The type of a value is written as
  int, float, str, bool, None   of this type; a float is finite, and may be
                                written as an integer
  range(1, 9)                   an integer in it
  {"a", "b"}                    one of these texts
  dict                          an object with any content
  {"key": type}                 an object; keys may be absent, others be there
  {str: type}                   an object, all of whose values have a type
  object                        anything
  [type]                        a list of such values
  [type, type]                  a list of two such values
  (type, type)                  any of them
"""

import collections
import json
import os
import reprlib
from collections.abc import Mapping
from typing import Any

from blip_jax.runtime import files

MAX_BYTES = 16 << 20
_MAX_NUMBER = 1e300  # leaves room for arithmetic

_HELP = "fetch or restore this file"
_NAMES = {
  int: "an integer",
  float: "a number",
  str: "a text",
  bool: "true or false",
  dict: "an object",
  None: "null",
}


def is_there(path: str | os.PathLike) -> bool:
  """Whether there is a file; unlike `files.is_file`, refuses all else.

  Raises:
    ValueError: there is a folder, a named pipe or the like.
  """
  if files.exists(path) and not files.is_file(path):
    raise ValueError(
      f"{path}: expected a file, found a folder, a pipe or a device; {_HELP}"
    )
  return files.exists(path)


def read(path: str | os.PathLike, types: Mapping[str, Any]) -> dict[str, Any]:
  """Reads an object; its values have the types that are asked for.

  Args:
    path: of a file of at most `MAX_BYTES`.
    types: of the values by key, see above.

  Raises:
    ValueError: names the file and the key, what was expected and found.
  """
  text = read_text(path)
  try:
    value = json.loads(text, object_pairs_hook=_object)
  except (ValueError, RecursionError) as error:
    deep = isinstance(error, RecursionError)
    why = "it is nested too deeply" if deep else f"{error!s:.200}"
    raise ValueError(
      f"{path}: cannot be read as JSON: {why}; {_HELP}"
    ) from None
  check(value, types, path)
  return value


def read_text(path: str | os.PathLike) -> str:
  """Reads a small text file.

  Raises:
    ValueError: there is no such file, or it is too large or no UTF-8.
  """
  try:
    if not is_there(path):
      raise ValueError(f"{path}: there is no such file; {_HELP}")
    size = files.size(path)
    if size > MAX_BYTES:
      raise ValueError(
        f"{path}: expected at most {MAX_BYTES} bytes, found {size}; {_HELP}"
      )
    return files.read_bytes(path).decode("utf-8")
  except OSError as error:
    why = error.strerror or type(error).__name__
    raise ValueError(f"{path}: cannot be read: {why}; {_HELP}") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: expected UTF-8: {error}; {_HELP}") from error


def check(
  value: Any, expected: Any, path: str | os.PathLike, key: str = ""
) -> None:
  """Compares a value with its type.

  Args:
    value: as JSON gives it.
    expected: its type, see above.
    path: of the file, for the error.
    key: in the file, for the error.

  Raises:
    ValueError: names the file and the key, what was expected and found.
  """
  if found := problem(value, expected, key):
    raise ValueError(f"{path}: {found}; {_HELP}")


def problem(
  value: Any, expected: Any, key: str = "", complete: bool = False
) -> str:
  """What is wrong with a value, by its key; "" if it has its type.

  Args:
    value: as JSON gives it.
    expected: its type, see above.
    key: in the file.
    complete: whether keys may not be absent.
  """
  if not _is(value, expected):
    return (
      f"{key or 'as a whole'}: expected {_describe(expected)}, found "
      f"{reprlib.repr(value)}"
    )
  if isinstance(expected, tuple):
    expected = next(option for option in expected if _is(value, option))
  if isinstance(expected, Mapping):
    if str in expected:
      expected = dict.fromkeys(value, expected[str])
    if complete and (absent := expected.keys() - value.keys()):
      return f"{key or 'as a whole'}: expected {min(absent)!r} in it"
    inner = f"{key}." if key else ""
    parts = [
      (value[name], expected[name], f"{inner}{name}")
      for name in value
      if name in expected
    ]
  elif isinstance(expected, list):
    parts = [(x, expected[0], f"{key}[{n}]") for n, x in enumerate(value)]
  else:
    parts = []
  problems = (problem(*part, complete=complete) for part in parts)
  return next(filter(None, problems), "")


def _is(value: Any, expected: Any) -> bool:
  """Whether a value has a type; what it contains is not looked at."""
  if isinstance(expected, tuple):
    return any(_is(value, option) for option in expected)
  if isinstance(expected, range):
    return type(value) is int and value in expected
  if isinstance(expected, set):
    return isinstance(value, str) and value in expected
  if isinstance(expected, list):
    any_size = len(expected) == 1
    return isinstance(value, list) and (any_size or len(value) == len(expected))
  if isinstance(expected, Mapping) or expected is dict:
    return isinstance(value, dict)
  if expected is object:
    return True
  if expected is float:
    return type(value) in (int, float) and abs(value) <= _MAX_NUMBER
  return value is None if expected is None else type(value) is expected


def _describe(expected: Any) -> str:
  if isinstance(expected, tuple):
    return " or ".join(map(_describe, expected))
  if isinstance(expected, range):
    return f"an integer from {expected[0]} to {expected[-1]}"
  if isinstance(expected, set):
    return f"one of {', '.join(sorted(expected))}"
  if isinstance(expected, list):
    count = f"{len(expected)} " if len(expected) > 1 else ""
    return f"a list of {count}values, each {_describe(expected[0])}"
  return "an object" if isinstance(expected, Mapping) else _NAMES[expected]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) < len(pairs):
    counts = collections.Counter(name for name, _ in pairs)
    ((name, count),) = counts.most_common(1)
    raise ValueError(f"the key {reprlib.repr(name)} is there {count} times")
  return value
