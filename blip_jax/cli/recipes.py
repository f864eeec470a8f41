"""Recipes by their names: `--config quickstart` works in any folder.

The files are those of `configs/`, which are installed as `blip_jax.configs`.
"""

import ast
import difflib
import functools
import importlib.util
import pathlib
import traceback
import types

from ml_collections import ConfigDict

from blip_jax.runtime import files
from blip_jax.runtime.command import UsageError
from blip_jax.runtime.config import Config


@functools.cache
def folder() -> pathlib.Path:
  """Where the recipes are.

  Raises:
    UsageError: the package is used without having been installed.
  """
  found = importlib.util.find_spec("blip_jax.configs")
  if found is None or not found.submodule_search_locations:
    raise UsageError(
      "--config: blip_jax is not installed here, so that recipes have no "
      "names; install it (pip install .), or give the path of a file"
    )
  return pathlib.Path(found.submodule_search_locations[0])


def names() -> list[str]:
  """All recipes, sorted."""
  return sorted(
    path.stem for path in folder().glob("*.py") if path.stem != "__init__"
  )


def summary(name: str) -> str:
  """The first line of a recipe's docstring."""
  tree = ast.parse(files.read_text(split(name)[0]))
  return (ast.get_docstring(tree) or "").partition("\n")[0]


def path_of(name: str) -> str:
  """The file of a recipe, given its bare name; any other path as it is.

  Raises:
    UsageError: a bare name that no recipe has.
  """
  if "/" in name or ".py" in name:
    return name
  if name not in names():
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UsageError(
      f"--config: no recipe is called {name!r}.{hint} There are: "
      f"{', '.join(names())}. A file of your own needs its path, such as "
      f"--config ./{name}.py"
    )
  return str(folder() / f"{name}.py")


def split(name: str) -> tuple[str, list[str]]:
  """The file of a recipe or path, and the arguments of its `get_config`.

  `mine.py:large` stands for `get_config("large")` of `mine.py`.
  """
  path, colon, argument = path_of(name).partition(".py:")
  return (f"{path}.py", [argument]) if colon else (path, [])


def load(name: str) -> Config:
  """The config of a recipe or of a file, locked.

  Args:
    name: of a recipe, or a path; see `split`.

  Raises:
    UsageError: there is no such recipe or file, or it makes no config; says
      where it failed.
  """
  path, arguments = split(name)
  if not files.is_file(path):
    raise UsageError(f"--config: there is no file {path}")
  module = types.ModuleType("config")
  module.__file__ = path
  try:
    code = compile(files.read_bytes(path), path, "exec")
    exec(code, vars(module))
    get_config = getattr(module, "get_config", None)
    if get_config is None:
      raise UsageError(f"--config: {path} has no function get_config()")
    config = get_config(*arguments)
  except UsageError:
    raise
  except Exception as error:  # whatever the file of a user raises
    raise UsageError(
      f"--config: {path}, line {_line(error, path)}: "
      f"{type(error).__name__}: {error}"
    ) from error
  if not isinstance(config, ConfigDict):
    raise UsageError(
      f"--config: get_config() of {path} returned {config!r}; expected a "
      "Config, as blip_jax/defaults.py makes them"
    )
  return config.lock()  # pyright: ignore[reportReturnType]


def _line(error: Exception, path: str) -> int | None:
  """The line of a file that raised an error, or in which its syntax is."""
  if isinstance(error, SyntaxError) and error.filename == path:
    return error.lineno
  frames = traceback.extract_tb(error.__traceback__)
  return next((f.lineno for f in reversed(frames) if f.filename == path), None)


def with_value(key: str, value: str) -> list[str]:
  """The recipes in which a key has a value, such as the job "search"."""
  return [name for name in names() if load(name).get(key) == value]
