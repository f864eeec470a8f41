"""Config keys given as text: `optim.lr` and "1e-4"."""

import ast
import difflib
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from blip_jax.runtime.command import UsageError
from blip_jax.runtime.config import Config

_BOOLEANS = {"true": True, "t": True, "1": True} | {
  "false": False,
  "f": False,
  "0": False,
}
# Below this a name is no misspelling of another.
_MIN_SIMILARITY = 0.6


def leaves(config: ConfigDict) -> dict[str, Any]:
  """All values by their dotted keys, such as `optim.lr`."""
  found = {}
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      below = leaves(value)
      found |= {f"{name}.{key}": below[key] for key in below}
    else:
      found[name] = value
  return found


def is_switch(config: Config, key: str) -> bool:
  """Whether a key is true or false, so that its flag needs no value.

  Raises:
    UsageError: there is no such key.
  """
  section, name = _locate(config, key)
  return section.get_type(name) is bool


def override(config: Config, key: str, texts: Sequence[str]) -> None:
  """Sets a key from the values of its flags.

  Args:
    config: which is changed.
    key: with dots.
    texts: in order. A tuple gets the elements of all; of any other type, the
      last counts.

  Raises:
    UsageError: there is no such key, or a text is no value of its type.
  """
  section, name = _locate(config, key)
  kind, old = section.get_type(name), section[name]
  try:
    if kind is tuple:
      parts = (_parts(text, old) for text in texts)
      section[name] = tuple(itertools.chain.from_iterable(parts))
    else:
      section[name] = _PARSERS.get(kind, ast.literal_eval)(texts[-1])
  except (ValueError, SyntaxError, TypeError) as error:
    expected = _EXPECTED.get(kind, f"a {kind.__name__}")
    if kind is tuple:
      expected = f"values such as {old}"
    raise UsageError(
      f"--config.{key}: expected {expected}, found {' '.join(texts)!r}"
    ) from error


def _boolean(text: str) -> bool:
  if text.lower() not in _BOOLEANS:
    raise ValueError(text)
  return _BOOLEANS[text.lower()]


_PARSERS: dict[type, Callable[[str], Any]] = {
  bool: _boolean,
  float: float,
  int: int,
  str: str,
}
_EXPECTED = {
  bool: "true or false",
  float: "a number",
  int: "an integer",
  str: "a text",
}


def _parts(text: str, old: tuple) -> tuple:
  """The elements that one text stands for, of the type of those of `old`."""
  kind = type(old[0]) if old else None
  if kind is str and not text.startswith(("(", "[", "'", '"')):
    return (text,)  # a name, even if it is 2024
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  parts = tuple(value) if isinstance(value, tuple | list) else (value,)
  if kind is float:
    parts = tuple(float(x) if type(x) is int else x for x in parts)
  if kind is not None and any(type(part) is not kind for part in parts):
    raise ValueError(text)
  return parts


def _locate(config: Config, key: str) -> tuple[Any, str]:
  """The section that holds a key, and the key's name there."""
  section: Any = config
  *parents, name = key.split(".")
  for parent in parents:
    section = section.get(parent) if isinstance(section, ConfigDict) else None
  if not isinstance(section, ConfigDict) or name not in section:
    near = " or ".join(f"--config.{k}" for k in nearest(key, leaves(config)))
    raise UsageError(
      f"--config.{key}: there is no such key."
      + (f" Did you mean {near}?" if near else "")
      + " With --help, the keys of a config are listed"
    )
  value: Any = section[name]
  if isinstance(value, ConfigDict):
    raise UsageError(
      f"--config.{key} is a section; set one of its keys: "
      + ", ".join(f"--config.{key}.{below}" for below in leaves(value))
    )
  return section, name


def nearest(key: str, keys: Sequence[str] | dict[str, Any]) -> list[str]:
  """The keys that a wrong one may stand for: up to three, most often one.

  The last parts of the names are compared, wherever they are: `lr` stands for
  `optim.lr`, and so does `learning_rate`, whose initials it has. Among equals
  the sections decide, if the wrong key has any.
  """
  alike = {known: _similarity(_last(key), _last(known)) for known in keys}
  best = max(alike.values(), default=0.0)
  if best < _MIN_SIMILARITY:
    return []
  equals = [known for known, score in alike.items() if score == best]
  if "." not in key:
    return equals[:3]
  return [max(equals, key=functools.partial(_ratio, key))]


def _last(key: str) -> str:
  return key.rpartition(".")[2]


def _similarity(one: str, other: str) -> float:
  """From 0 to 1, where 1 is equal but for letter case and underscores."""
  one, other = one.lower(), other.lower()
  words, others = one.split("_"), other.split("_")
  if "".join(words) == "".join(others):
    return 1.0
  if _initials(words) == other or _initials(others) == one:
    return 0.95
  ratio = _ratio(one, other)
  if set(words) <= set(others) or set(others) <= set(words):
    return 0.8 + 0.1 * ratio  # steps: num_steps
  return ratio


def _ratio(one: str, other: str) -> float:
  return difflib.SequenceMatcher(None, one, other).ratio()


def _initials(words: Sequence[str]) -> str:
  return "".join(word[:1] for word in words) if len(words) > 1 else ""
