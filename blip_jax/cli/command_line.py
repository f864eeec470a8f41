"""The command line: flags, and config keys as flags."""

import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from blip_jax.cli import recipes
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
    own: the config before flags changed it, locked.
    given: the keys that flags set, such as "optim.lr".
    workdir: absolute path.
    distributed: see FLAGS.
  """

  recipe: str
  config: Config
  own: Config
  given: tuple[str, ...]
  workdir: str
  distributed: str


def parse(argv: Sequence[str]) -> Command:
  """Understands the words of a command line, without creating anything.

  Raises:
    UsageError: says which word, what was expected, and what is similar.
    io.UnsupportedOperation: a path has a scheme, such as hdfs://.
    ImportError: a path is in an object store, without the extra [cloud].
    ValueError: a folder of images does not exist.
  """
  own, rest = _own_flags(argv)
  if not own.config:
    raise UsageError(
      "--config: expected a recipe or the path of a file; the recipes are "
      f"{', '.join(recipes.names())}. --help describes them"
    )
  config = recipes.load(own.config)
  unchanged = recipes.load(own.config)
  given = _override(config, rest)
  workdir = own.workdir or f"runs/{pathlib.Path(own.config).stem}"
  _check_schemes("--workdir", workdir)
  for key, value in overrides.leaves(config).items():
    _check_schemes(f"config.{key}", value)
    if value != value:
      raise UsageError(f"--config.{key}: expected a number, found {value}")
    if key in given and key.endswith("image_root"):
      _check_folder(f"config.{key}", value)
  return Command(
    own.config,
    config,
    unchanged,
    given,
    files.absolute(workdir),
    own.distributed,
  )


def recipe_of(argv: Sequence[str]) -> str:
  """What stands behind --config; "" if nothing does."""
  return _own_flags(argv)[0].config


def wants_help(argv: Sequence[str]) -> bool:
  return any(re.fullmatch("-h|--?help(full|short)?", word) for word in argv)


def _own_flags(argv: Sequence[str]) -> tuple[Any, list[str]]:
  """The flags that are no keys of the config, and the words that are left."""
  values = flags.FlagValues()
  values.set_gnu_getopt()
  defaults = {"config": "", "workdir": "", "distributed": "off"}
  for name, default in defaults.items():
    flags.DEFINE_string(name, default, FLAGS[name], flag_values=values)
  try:
    _, *rest = values(["blip-jax", *argv], known_only=True)
  except flags.Error as error:
    raise UsageError(
      f"{error}; the recipes are {', '.join(recipes.names())}"
    ) from error
  return values, rest


def _override(config: Config, words: Sequence[str]) -> tuple[str, ...]:
  """Sets the keys of a config that flags give; returns the keys."""
  for word in words:
    if match := re.match(r"--?(no)?config\.([^=]+)", word):
      overrides.check_key(config, match[2])
    elif word.startswith("-") and not re.match(r"-\.?\d", word):
      raise UsageError(_unknown(word, config))
  before = overrides.leaves(config)
  values = flags.FlagValues()
  values.set_gnu_getopt()
  config_flags.DEFINE_config_dict(
    "config", config, flag_values=values, sys_argv=["blip-jax", *words]
  )
  try:
    _, *rest = values(["blip-jax", *words])
  except flags.IllegalFlagValueError as error:
    raise UsageError(_wrong_type(config, str(error))) from error
  except flags.Error as error:
    raise UsageError(f"{error}") from error
  if rest:
    raise UsageError(f"unexpected argument {rest[0]!r}: flags begin with --")
  given = config_flags.get_override_values(values["config"])
  for key, value in given.items():
    overrides.check_elements(key, value, before[key])
  return tuple(given)


def _wrong_type(config: Config, message: str) -> str:
  """What a flag expected: of absl's message, only key and value are plain."""
  key, value = re.findall(r"(?s)flag --config\.([\w.]+)=(.*?): ", message)[0]
  expected = overrides.expected(config, key)
  return f"--config.{key}: expected {expected}, found {value!r}"


def _unknown(word: str, config: Config) -> str:
  name = word.lstrip("-").partition("=")[0]
  known = [*FLAGS, *(f"config.{key}" for key in overrides.leaves(config))]
  near = " or ".join(f"--{flag}" for flag in overrides.nearest(name, known))
  hint = f" Did you mean {near}?" if near else ""
  return f"--{name}: there is no such flag.{hint}"


def _check_schemes(name: str, value: Any) -> None:
  """Raises what `files.check` raises, with the name of the key."""
  for text in value if isinstance(value, tuple) else (value,):
    if not isinstance(text, str) or _is_text(name, text):
      continue
    if name in _WEIGHTS and text.startswith(("http://", "https://")):
      continue
    if text.startswith("tfds:"):  # TFDS reads the paths of its options
      text = text.removeprefix("tfds:").partition("?")[0]
      check = files.local
    else:
      check = files.check
    try:
      check(text)
    except (OSError, ImportError) as error:
      raise type(error)(f"{name}: {error}") from error


def _check_folder(name: str, path: str) -> None:
  """Otherwise every image would be missing, which only a job would find out."""
  if path and not files.is_folder(path):
    raise ValueError(
      f"{name}: expected the folder that paths of images start from, found no "
      f"folder at {path}"
    )


def _is_text(name: str, value: str) -> bool:
  """Whether a value is no path, but words for a model.

  A query may be either: one of several words that is a path after all is
  refused when it is read.
  """
  is_query = name == "config.queries"
  return name.endswith(".prompt") or (is_query and len(value.split()) > 1)
