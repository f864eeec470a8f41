"""The texts of --help: of the command, and of the keys of a config."""

import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from blip_jax.cli import command_line, key_comments, recipes
from blip_jax.runtime import overrides

_WIDTH = 96
# A longer value has a line of its own.
_MAX_VALUE = 24


def text(argv: Sequence[str], jobs: Mapping[str, Callable]) -> str:
  """What --help prints: about the config of the command line, if it has one.

  Args:
    argv: words of the command line.
    jobs: values of `config.job` and their functions.

  Raises:
    UsageError: the rest of the command line has a mistake.
  """
  recipe = command_line.recipe_of(argv)
  lines = _of_config(argv, recipe) if recipe else _of_command(jobs)
  return "\n".join(lines)


def _of_command(jobs: Mapping[str, Callable]) -> Iterator[str]:
  yield "blip-jax --config RECIPE [--workdir DIR] [--config.KEY=VALUE ...]"
  yield ""
  flags = command_line.FLAGS
  yield from _table({f"--{name}": flags[name] for name in flags})
  yield ""
  yield "Recipes; with --help, each lists its keys:"
  yield from _table({name: recipes.summary(name) for name in recipes.names()})
  yield ""
  yield "Jobs, values of --config.job where the recipe has another:"
  summary = lambda job: (inspect.getdoc(jobs[job]) or "").partition("\n\n")[0]
  yield from _table({job: " ".join(summary(job).split()) for job in jobs})


def _of_config(argv: Sequence[str], recipe: str) -> Iterator[str]:
  words = [word for word in argv if not command_line.wants_help([word])]
  config = command_line.parse(words).config
  notes = key_comments.of_file(recipes.split(recipe)[0])
  yield f"{recipe}: {recipes.summary(recipe)}"
  yield ""
  yield "Keys and their values; --config.KEY=VALUE changes one."
  values = overrides.leaves(config)
  sections = dict.fromkeys(key.rpartition(".")[0] for key in values)
  for section in sorted(sections):
    yield ""
    keys = [key for key in values if key.rpartition(".")[0] == section]
    if said := notes.of(section):
      yield from textwrap.wrap(f"{section}: {said}", _WIDTH)
    yield from _keys({key: values[key] for key in keys}, notes)


def _keys(
  values: Mapping[str, Any], notes: key_comments.Notes
) -> Iterator[str]:
  """Lines with three columns: keys, their values, and what is said of them."""
  shown = {key: _shown(value) for key, value in values.items()}
  lengths = map(len, shown.values())
  room = max((n for n in lengths if n <= _MAX_VALUE), default=0)
  width = max(map(len, values))
  for key, value in shown.items():
    if len(value) > room:
      yield from _row(key, width, value)
      yield from _row("", width + 2 + room, notes.of(key))
    else:
      yield from _row(f"{key:{width}}  {value:{room}}", 0, notes.of(key))


def _shown(value: Any) -> str:
  return "unset" if value is None else repr(value)


def _table(rows: Mapping[str, str]) -> Iterator[str]:
  """Lines with two columns."""
  width = max(map(len, rows))
  for head, cell in rows.items():
    yield from _row(head, width, cell)


def _row(head: str, width: int, cell: str) -> Iterator[str]:
  """A line of two columns; the second is wrapped."""
  head = f"  {head:{width}}  "
  if cell or head.strip():
    yield from textwrap.wrap(
      cell,
      _WIDTH,
      initial_indent=head,
      subsequent_indent=" " * len(head),
      break_long_words=False,
      break_on_hyphens=False,
    ) or [head.rstrip()]
