"""The command line: flags, and config keys as flags."""

import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from blip_jax import recipes
from blip_jax.runtime import files, overrides
from blip_jax.runtime.command import UsageError
from blip_jax.runtime.config import Config

FLAGS = {
  "config": "A recipe by its name, or the path of a file with get_config().",
  "workdir": "Folder of the run; runs/<name of the config> by default. If it "
  "holds a run, the run is resumed.",
  "distributed": "Whether other processes take part: off (default), auto "
  "(Cloud TPU, Slurm, Open MPI), or HOST:PORT,PROCESSES,INDEX of the first "
  "process.",
  "help": "This text, or with --config the keys of that config.",
}
# What may be downloaded by its URL.
_WEIGHTS = (
  "config.model",
  "config.captioner",
  "config.filter",
  "config.init.weights",
)


class Command(NamedTuple):
  """A command line that was understood.

  Attributes:
    recipe: name or path of the config.
    config: with the values of the flags, locked.
    own_job: `config.job` before flags changed it.
    workdir: absolute path.
    distributed: see FLAGS.
  """

  recipe: str
  config: Config
  own_job: str
  workdir: str
  distributed: str


def parse(argv: Sequence[str]) -> Command:
  """Understands the words of a command line, without creating anything.

  Raises:
    UsageError: says which word, what was expected, and what is similar.
    io.UnsupportedOperation: a path has a scheme, such as gs://.
  """
  recipe = recipe_of(argv)
  if not recipe:
    raise UsageError(
      "--config: expected a recipe or the path of a file; the recipes are "
      f"{', '.join(recipes.names())}. --help describes them"
    )
  config = recipes.load(recipe)
  own_job = str(config.get("job", ""))
  flags = {"workdir": f"runs/{pathlib.Path(recipe).stem}", "distributed": "off"}
  texts: dict[str, list[str]] = {}
  for name, value in _flags(argv, config):
    if name.startswith("config."):
      texts.setdefault(name.removeprefix("config."), []).append(value)
    else:
      flags[name] = value
  for key in texts:
    overrides.override(config, key, texts[key])
  paths = {"--workdir": flags["workdir"]}
  values = overrides.leaves(config)
  paths |= {f"config.{key}": values[key] for key in values}
  for name in paths:
    _refuse_schemes(name, paths[name])
  workdir = files.absolute(flags["workdir"])
  return Command(recipe, config, own_job, workdir, flags["distributed"])


def recipe_of(argv: Sequence[str]) -> str:
  """What stands behind --config; "" if nothing does."""
  found, words = "", iter(argv)
  for word in words:
    if match := re.fullmatch(r"(?s)--?config(?:=(.*))?", word):
      found = next(words, "") if match[1] is None else match[1]
  return found


def wants_help(argv: Sequence[str]) -> bool:
  return any(re.fullmatch("-h|--?help(full|short)?", word) for word in argv)


def _flags(argv: Sequence[str], config: Config) -> Iterator[tuple[str, str]]:
  """Yields the name and the value of each flag."""
  words = iter(argv)
  for word in words:
    match = re.fullmatch(r"(?s)--?([a-zA-Z][^=]*)(?:=(.*))?", word)
    if not match:
      raise UsageError(f"unexpected argument {word!r}: flags begin with --")
    name, value = match.groups()
    key = name.partition("config.")[2]
    switch = name.removesuffix(key) in ("config.", "noconfig.")
    switch = switch and overrides.is_switch(config, key)
    if switch and name.startswith("no"):
      name, value = f"config.{key}", "false"
    elif not name.startswith("config.") and name not in FLAGS:
      raise UsageError(_unknown(name, config))
    elif value is None:
      value = "true" if switch else next(words, "--")
      if value.startswith("--"):
        raise UsageError(f"--{name}: expected a value")
    yield name, value


def _unknown(name: str, config: Config) -> str:
  known = [*FLAGS, *(f"config.{key}" for key in overrides.leaves(config))]
  near = " or ".join(f"--{flag}" for flag in overrides.nearest(name, known))
  hint = f" Did you mean {near}?" if near else ""
  return f"--{name}: there is no such flag.{hint}"


def _refuse_schemes(name: str, value: Any) -> None:
  """Raises `io.UnsupportedOperation` for values such as gs://bucket/x."""
  for text in value if isinstance(value, tuple) else (value,):
    # TFDS reads its own paths.
    if not isinstance(text, str) or text.startswith("tfds:"):
      continue
    if name in _WEIGHTS and text.startswith(("http://", "https://")):
      continue
    try:
      files.local(text)
    except OSError as error:
      raise type(error)(f"{name}: {error}") from error
