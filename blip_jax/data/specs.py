"""The syntax of a source's spec: `path?key=value&...`, and patterns of paths.

The sources themselves are opened by `data.datasets`.
"""

import ast
import inspect
import itertools
import os
import re
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from blip_jax.data import kept_columns
from blip_jax.runtime import files, trees


def shard_specs(spec: str) -> list[str]:
  """Returns the specs of the files that `spec` stands for, each a source.

  Only tar shards and Parquet files are split; for others the list is empty.
  """
  path, query = split_query(spec)
  if os.path.splitext(path)[1].lower() not in (".tar", ".parquet"):
    return []
  suffix = f"?{query}" if query else ""
  return [shard + suffix for shard in expand(path)]


def path_of(spec: str) -> str:
  """Returns a spec without its options: for a single file, its path."""
  return split_query(spec)[0]


def expand(pattern: str) -> list[str]:
  """Returns the paths that match a pattern with {a,b}, {00..99}, * or **.

  A path that matches several alternatives is returned once.

  Raises:
    ValueError: a pattern with `*`, `?` or `[` matches no file.
  """
  paths = []
  for path in _braces(pattern):
    matches = trees.glob(path) if files.has_magic(path) else [path]
    if not matches:
      raise ValueError(f"{path}: no such files.")
    paths.extend(matches)
  return list(dict.fromkeys(paths))


def _braces(pattern: str) -> list[str]:
  pieces = re.split(r"\{([^{}]*)\}", pattern)
  # Text and contents of braces alternate.
  choices = [_choices(p) if i % 2 else [p] for i, p in enumerate(pieces)]
  return ["".join(path) for path in itertools.product(*choices)]


def _choices(braces: str) -> list[str]:
  numbers = re.fullmatch(r"(\d+)\.\.(\d+)", braces)
  if not numbers:
    return braces.split(",")
  first, last = numbers.groups()
  return [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]


def split_query(spec: str) -> tuple[str, str]:
  """Splits "address?key=value&..."; in a pattern "?" matches a letter."""
  address, _, query = spec.rpartition("?")
  return (address, query) if "=" in query else (spec, "")


# Arguments of sources that a spec cannot set.
_INTERNAL = (
  *("image_root", "with_captions", "needs_image"),
  *("with_questions", "with_statements", "with_dialogs"),
)


def options(
  query: str, target: Callable, keep: Sequence[str] = ()
) -> dict[str, Any]:
  """Parses "key=value&..."; keys must be options of `target`.

  Args:
    keep: columns to keep in addition to those of the query.
  """
  parameters = {
    name: parameter
    for name, parameter in inspect.signature(target).parameters.items()
    if parameter.default is not parameter.empty and name not in _INTERNAL
  }
  found = {}
  for key, value in _pairs(query):
    if key not in parameters:
      raise ValueError(
        f"?{query}: no option {key!r}; there are {list(parameters)}."
      )
    is_text = parameters[key].annotation in (str, str | None)
    found[key] = value if is_text else _literal(value)
  kept = all_kept(query, keep)
  return found | {"keep": kept} if kept else found


def _pairs(query: str) -> list[tuple[str, str]]:
  # A plus is a plus, as in ?delimiter=+; only forms on the web mean a space.
  query = query.replace("+", "%2B")
  return urllib.parse.parse_qsl(query, strict_parsing=bool(query))


def all_kept(query: str, keep: Sequence[str]) -> tuple[str, ...]:
  """Returns the columns to keep: the argument's, then the query's."""
  named = [value for key, value in _pairs(query) if key == "keep"]
  # Refuses a text, whose letters would become columns.
  given = kept_columns.names(keep)
  return (*given, *(name for value in named for name in value.split(",")))


def without_keep(query: str) -> str:
  """Returns a query without the columns to keep."""
  pairs = [pair for pair in _pairs(query) if pair[0] != "keep"]
  return urllib.parse.urlencode(pairs)


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):  # a word: the value is the text itself
    return text
