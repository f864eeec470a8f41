"""Recipes by their names: `--config quickstart` works in any folder.

The files are those of `configs/`, which are installed as `blip_jax.configs`.
"""

import difflib
import functools
import importlib.util
import pathlib
from collections.abc import Sequence


@functools.cache
def folder() -> pathlib.Path:
  """Where the recipes are.

  Raises:
    ValueError: the package is used without having been installed.
  """
  found = importlib.util.find_spec("blip_jax.configs")
  if found is None or not found.submodule_search_locations:
    raise ValueError(
      "--config: blip_jax is not installed here, so that recipes have no "
      "names; install it (pip install .), or give the path of a file"
    )
  return pathlib.Path(found.submodule_search_locations[0])


def names() -> list[str]:
  """All recipes, sorted."""
  return sorted(
    path.stem for path in folder().glob("*.py") if path.stem != "__init__"
  )


def path_of(name: str) -> str:
  """The file of a recipe, given its bare name; any other path as it is.

  Raises:
    ValueError: a bare name that no recipe has.
  """
  if "/" in name or ".py" in name:
    return name
  if name not in names():
    near = difflib.get_close_matches(name, names(), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
      f"--config: no recipe is called {name!r}.{hint} There are: "
      f"{', '.join(names())}. A file of your own needs its path, such as "
      f"--config ./{name}.py"
    )
  return str(folder() / f"{name}.py")


def with_paths(argv: Sequence[str]) -> list[str]:
  """The arguments of a command, with `--config NAME` made `--config FILE`."""
  words, is_value = [], False
  for word in argv:
    flag, equals, value = word.partition("=")
    if is_value:
      words.append(path_of(word))
    elif flag in ("--config", "-config") and equals:
      words.append(f"{flag}={path_of(value)}")
    else:
      words.append(word)
    is_value = word in ("--config", "-config")
  return words
