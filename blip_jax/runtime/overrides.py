"""Config keys as users name them: which exist, and what may be meant."""

import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from blip_jax.runtime.command import UsageError
from blip_jax.runtime.config import Config

# Below this a name is no misspelling of another.
_MIN_SIMILARITY = 0.6


def leaves(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
  """All values by their dotted keys, such as `optim.lr`."""
  found = {}
  for name, value in config.items():
    if isinstance(value, ConfigDict | Mapping):
      below = leaves(value)
      found |= {f"{name}.{key}": below[key] for key in below}
    else:
      found[name] = value
  return found


def check_key(config: Config, key: str) -> None:
  """Checks that a key exists and is no section.

  Raises:
    UsageError: names the nearest keys, or those of the section.
  """
  _locate(config, key)


def expected(config: Config, key: str) -> str:
  """What a key may be set to, in words."""
  section, name = _locate(config, key)
  kind = section.get_type(name)
  return _EXPECTED.get(kind, f"a {kind.__name__}")


def check_elements(key: str, value: Any, before: Any) -> None:
  """Checks that the elements of a tuple have the type of those before.

  Raises:
    UsageError: says the key, expected and found.
  """
  if not isinstance(before, tuple) or not before:
    return
  kinds = (int, float) if isinstance(before[0], float) else type(before[0])
  if not all(isinstance(element, kinds) for element in value):
    raise UsageError(
      f"--config.{key}: expected values such as {before}, found {value}"
    )


_EXPECTED = {
  bool: "true or false",
  float: "a number",
  int: "an integer",
  str: "a text",
}


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
