"""The items of a step on disk, each in a folder of its own.

  params, momentum, opt_state   arrays, in pieces as they were sharded
  data                          position of each process in its data, JSON
  meta, config                  the step; the config of the run, JSON
  model                         companion files: description and vocabulary

Items are separate so that inference reads the weights alone, on any mesh.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from blip_jax.runtime import stopping

ARRAYS = ("params", "momentum", "opt_state")


def load(folder: epath.Path, name: str, abstract: Any) -> Any:
  """Loads one item, as its abstract value asks.

  Raises:
    ValueError: the item is missing or broken.
  """
  try:
    return ocp.load_checkpointables(folder, {name: abstract})[name]
  except Exception as error:
    raise damaged(folder, name) from error


def damaged(folder: epath.Path, name: str) -> ValueError:
  """The error of an item that is missing or broken.

  Raises:
    stopping.Stopped: it could not be read because this process shall stop.
  """
  stopping.raise_if_swallowed()
  return ValueError(
    f"{folder} is not a complete checkpoint: cannot read {name}/ (expected are "
    f"{', '.join(ARRAYS)}, data, meta and config). Delete or move this folder "
    f"to resume from an earlier step"
  )


class JsonItem:
  """A JSON value as an Orbax item, in a file that people can read."""

  def __init__(self, filename: str, value: Any = None):
    self.filename = filename
    self.value = value

  async def save(self, directory):
    # Rendered now, before the loader moves on; written in the background.
    text = json.dumps(self.value, indent=2, sort_keys=True)
    return await FilesItem({self.filename: text}).save(directory)

  async def load(self, directory):
    async def read():
      self.value = json.loads((directory / self.filename).read_text())

    return read()


class FilesItem:
  """Text files as an Orbax item.

  Each process writes its own file if the name tells them apart; otherwise only
  the first process writes.
  """

  def __init__(self, files: Mapping[str, str]):
    self._files = dict(files)

  async def save(self, directory):
    async def write():
      folder = await directory.await_creation()
      for name, text in self._files.items():
        if name == process_file() or jax.process_index() == 0:
          (folder / name).write_text(text)

    return write()

  async def load(self, directory):
    async def read():
      names = [path.name for path in directory.iterdir()]
      self._files = {name: (directory / name).read_text() for name in names}

    return read()


def process_file(index: int | None = None, count: int | None = None) -> str:
  """The name of the file that one process writes; this one by default."""
  index = jax.process_index() if index is None else index
  count = jax.process_count() if count is None else count
  return f"process_{index}-of-{count}.json"
