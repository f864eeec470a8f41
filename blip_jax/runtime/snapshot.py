"""One step of a run on disk: what its folder holds, and how to read it.

`WORKDIR/checkpoints/<step>/` has one folder per item:
  params, momentum, opt_state   arrays, in pieces as they were sharded
  data                          where each process was in its data, JSON
  meta, config                  the step; the config that made the run, JSON
  model                         what the parameters are, and the vocabulary
Items are apart so that inference reads the weights alone, on any mesh. The
folder gets its final name only when every process has written its part, so a
name that is a number is a whole step.
"""

import concurrent.futures
import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from blip_jax.runtime import sharding

FOLDER = "checkpoints"
ARRAYS = ("params", "momentum", "opt_state")
# What is read at a time where arrays are wanted one by one: Orbax takes 30 ms
# for each time, however little it reads.
PART_BYTES = 2**27


def find(path: str | os.PathLike) -> epath.Path:
  """Finds a checkpoint: a step's folder, or the latest step of a workdir.

  Raises:
    ValueError: there is none; says what was looked for.
  """
  path = epath.Path(path).absolute()
  if (path / "params").exists():
    return path
  root = path / FOLDER if (path / FOLDER).exists() else path
  found = steps(root)
  if not found:
    raise ValueError(
      f"{path} holds no checkpoint: expected a run's workdir (with "
      f"{FOLDER}/<step>/ in it) or the folder of one step (with params/ in it)"
    )
  return root / str(max(found))


def steps(root: epath.Path) -> list[int]:
  """The steps that a folder of checkpoints holds."""
  if not root.is_dir():
    return []
  return [int(p.name) for p in root.iterdir() if p.name.isdecimal()]


def holds_one(path: str | os.PathLike) -> bool:
  """Whether there is a checkpoint of ours at a path, whole or not."""
  path = epath.Path(path)
  if (path / "params").exists() or (path / FOLDER).exists():
    return True
  return any((path / str(step) / "params").exists() for step in steps(path))


def load_to_host(folder: epath.Path, name: str) -> Any:
  """Loads an item of ARRAYS into host memory, as NumPy arrays."""
  return load(folder, name, _on_host(stored(folder, name)))


def load_on_mesh(folder: epath.Path, name: str, mesh: jax.sharding.Mesh) -> Any:
  """Loads an item of ARRAYS onto a mesh, each shard straight to its device.

  The mesh need not be the one that it was trained on.

  Returns:
    Nested dicts; of `params`, as the model's `init` makes them.
  """
  return load(folder, name, sharding.abstract_state(stored(folder, name), mesh))


def stored(folder: epath.Path, name: str) -> Any:
  """The tree of shapes and dtypes that one item of a checkpoint holds.

  Raises:
    ValueError: the item is missing or broken.
  """
  cause = None
  try:
    metadata = ocp.metadata(folder, checkpointable_name=name).metadata
  # Orbax and TensorStore raise many types for what is not whole, none of which
  # says that another checkpoint would do; for some damage there is only None.
  except Exception as error:
    metadata, cause = None, error
  if metadata is None:
    raise _damaged(folder, name) from cause
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata
  )


def load(folder: epath.Path, name: str, abstract: Any) -> Any:
  """Loads one item, as its abstract value asks.

  Raises:
    ValueError: the item is missing or broken.
  """
  try:
    return ocp.load_checkpointables(folder, {name: abstract})[name]
  except Exception as error:
    raise _damaged(folder, name) from error


def _damaged(folder: epath.Path, name: str) -> ValueError:
  return ValueError(
    f"{folder} is not a whole checkpoint: cannot read {name}/ (expected are "
    f"{', '.join(ARRAYS)}, data, meta and config). Delete or move this folder "
    f"to continue from an earlier step"
  )


def by_path(tree: Any) -> dict[str, Any]:
  """Maps the path of each leaf to the leaf."""
  return {
    sharding.path_str(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Undoes `by_path` for parameters, which are plain dicts."""
  return traverse_util.unflatten_dict(leaves, sep="/")


def digest(tree: Any) -> str:
  """Hashes path, dtype, shape and bytes of each leaf, in order of the paths."""
  found = hashlib.sha256()
  for path, leaf in sorted(by_path(tree).items()):
    found.update(f"{path} {leaf.dtype.name} {leaf.shape}\n".encode())
    found.update(np.asarray(leaf).tobytes())
  return found.hexdigest()


def differences(
  theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> list[str]:
  """What keeps one set of arrays from standing for the other, a line each."""

  def text(leaf):
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"

  missing = [f" - {path}" for path in sorted(ours.keys() - theirs.keys())]
  unexpected = [f" + {path}" for path in sorted(theirs.keys() - ours.keys())]
  return [
    *missing,
    *unexpected,
    *(
      f"   {path}: checkpoint {text(theirs[path])}, config {text(ours[path])}"
      for path in sorted(theirs.keys() & ours.keys())
      if text(theirs[path]) != text(ours[path])
    ),
  ]


def first_lines(lines: Sequence[str], limit: int = 20) -> str:
  """A wrong width differs in every line; twenty of them tell it."""
  rest = len(lines) - limit
  more = [f"   ... and {rest} more"] if rest > 0 else []
  return "\n".join([*lines[:limit], *more])


class Arrays:
  """The arrays of one item of a checkpoint, by path: `params`, unless another
  is named."""

  def __init__(self, folder: epath.Path, item: str = "params"):
    self._folder = folder
    self._item = item
    self.stored = by_path(stored(folder, item))

  @property
  def momentum(self) -> "Arrays | None":
    """Twin and queues that lie beside these parameters."""
    beside = (self._folder / "momentum").exists()
    return Arrays(self._folder, "momentum") if beside else None

  def load(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of some paths: with the shardings that are asked for, or in
    host memory where an array of NumPy's asks."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
      return by_path(load(self._folder, self._item, nested(wanted)))

  def readers(self) -> dict[str, Callable[[], np.ndarray]]:
    """Functions that read each array into host memory.

    Neighbours are read together, the next of them meanwhile, and kept until
    others are wanted: who calls in order reads everything once, waits little,
    and holds little.
    """
    parts = _parts(self.stored)
    pool, lock = concurrent.futures.ThreadPoolExecutor(1), threading.Lock()

    # Three: an array of theirs may be made of two of ours, on both sides of a
    # border.
    @functools.lru_cache(maxsize=3)
    def part(number):
      wanted = {path: self.stored[path] for path in parts[number]}
      return pool.submit(self.load, _on_host(wanted))

    def read(number, path):
      # Or two threads would begin to read the same.
      with lock:
        wanted = part(number)
        if number + 1 < len(parts):
          part(number + 1)
      return wanted.result()[path]

    return {
      path: functools.partial(read, number, path)
      for number, paths in enumerate(parts)
      for path in paths
    }

  def __str__(self) -> str:
    return str(self._folder)


def _on_host(tree: Any) -> Any:
  """What asks Orbax for NumPy's arrays."""
  return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), tree)


def _parts(leaves: Mapping[str, jax.ShapeDtypeStruct]) -> list[list[str]]:
  """Paths in groups of `PART_BYTES` at most, or of one larger array."""
  parts, room = [], 0
  for path, leaf in leaves.items():
    size = leaf.size * np.dtype(leaf.dtype).itemsize
    if size > room:
      parts.append([])
      room = PART_BYTES
    parts[-1].append(path)
    room -= size
  return parts


class JsonItem:
  """A JSON value as an Orbax item, in a file that people can read."""

  def __init__(self, filename: str, value: Any = None):
    self.filename = filename
    self.value = value

  async def save(self, directory):
    # Rendered before the loader moves on; written in the background.
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


def process_file() -> str:
  """The name of the file that only this process writes and reads."""
  return f"process_{jax.process_index()}-of-{jax.process_count()}.json"
