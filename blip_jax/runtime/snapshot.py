"""One step of a run on disk: what its folder holds, and how to read it.

`WORKDIR/checkpoints/<step>/` has one folder per item:
  params, momentum, opt_state   arrays, in pieces as they were sharded
  data                          position of each process in its data, JSON
  meta, config                  the step; the config of the run, JSON
  model                         companion files: description and vocabulary
and `digests.json`, the digests of all files (see `digests.py`). Items are
separate so that inference reads the weights alone, on any mesh. The
folder gets its final name only when every process has written its part, so a
folder whose name is a number is complete.
"""

import concurrent.futures
import functools
import hashlib
import json
import logging
import os
import pathlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from blip_jax.runtime import digests, files, remote_steps, sharding

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
ARRAYS = ("params", "momentum", "opt_state")
# What `meta.json` says of the form of a step; one without it is of form 1.
FORMAT = 1
# Arrays that are needed one by one are read in parts of this size: Orbax takes
# 30 ms for each read, however small.
PART_BYTES = 2**27
# The name of a step that gives way to another: see `best.py`.
REPLACED = ".replaced"

# Folders of steps that this process found to be damaged, and those without
# digests that it told of.
_damage_of: dict[str, digests.Damaged] = {}
_told: set[str] = set()


def find(path: str | os.PathLike) -> epath.Path:
  """Finds a checkpoint: the folder of a step, or the latest of a workdir.

  One in an object store is copied to this machine. A step of a workdir that is
  known to be damaged is passed over, loudly. Known are sizes of all files, the
  content of small ones, and what `remember` was told; see `find_sound` for the
  rest.

  Raises:
    ValueError: there is none, or none that is sound; says what was expected.
  """
  if files.is_remote(path):
    return _find_remote(files.as_path(path))
  path = epath.Path(files.local(path)).absolute()
  if _is_step(path):
    if not _is_usable(path):
      raise _damage_of[str(path)]
    return path
  root = path / FOLDER if (path / FOLDER).exists() else path
  found = [root / str(step) for step in sorted(steps(root), reverse=True)]
  # What a process that was killed between two renames left.
  found = found or sorted(root.glob(f"*{REPLACED}")) if root.is_dir() else []
  if not found:
    raise _no_checkpoint(path)
  return _first_usable(root, found)


def _find_remote(path: pathlib.PurePath) -> epath.Path:
  if digests.exists(path):
    folder = remote_steps.fetch(path)
    if not _is_usable(folder):
      raise _damage_of[str(folder)]
    return folder
  root = path / FOLDER if files.is_folder(path / FOLDER) else path
  found = sorted(remote_steps.numbers(root), reverse=True)
  if not found:
    raise _no_checkpoint(path)
  # Copied one by one, as they are asked for.
  folders = (remote_steps.fetch(root / str(step)) for step in found)
  return _first_usable(root, folders)


def _no_checkpoint(path: files.Path) -> ValueError:
  return ValueError(
    f"{path} holds no checkpoint: expected a run's workdir (with "
    f"{FOLDER}/<step>/ in it) or the folder of one step (with params/ in it)"
  )


def _first_usable(
  root: files.Path, folders: Iterable[epath.Path]
) -> epath.Path:
  found = []
  for folder in folders:
    if _is_usable(folder):
      return folder
    found.append(folder)
  reasons = "\n".join(f"  {_damage_of[str(folder)]}" for folder in found)
  raise ValueError(
    f"{root} holds no sound checkpoint:\n{reasons}\n"
    "Restore one of these folders from a copy; or move them away, and start "
    "again with another --workdir or from other weights"
  )


def find_sound(
  path: str | os.PathLike, items: Iterable[str] | None = None
) -> epath.Path:
  """Finds a checkpoint as `find` does, and reads the files of some items.

  Args:
    path: as of `find`.
    items: what has to be sound, such as "params"; by default everything.

  Raises:
    ValueError: as `find`.
  """
  items = None if items is None else tuple(items)
  while True:
    folder = find(path)
    try:
      digests.check(folder, items)
      return folder
    except digests.Damaged as damage:
      remember(damage)


def remember(damage: digests.Damaged) -> None:
  """Makes `find` pass over the folder of a step from now on.

  Raises:
    digests.Damaged: it is known already, so that nothing else can be used.
  """
  if damage.folder in _damage_of:
    raise damage
  _damage_of[damage.folder] = damage
  log.warning("%s. The newest sound step is used instead", damage)


def forget(folder: epath.Path) -> None:
  """Undoes `remember`, for a folder that was replaced or renamed."""
  _damage_of.pop(str(folder), None)


def damaged_in(root: epath.Path) -> list[epath.Path]:
  """The folders of steps that are known to be damaged."""
  folders = [root / str(step) for step in steps(root)]
  return [folder for folder in folders if str(folder) in _damage_of]


def _is_step(path: epath.Path) -> bool:
  return (path / "params").exists() or digests.exists(path)


def _is_usable(folder: epath.Path) -> bool:
  """Whether a step is not known to be damaged; tells of it the first time."""
  if str(folder) in _damage_of:
    return False
  lines = digests.damage(
    folder, lambda name: name.partition("/")[0] not in ARRAYS
  )
  if not (folder / "params").exists():
    lines.append("params/ is missing")
  if lines:
    remember(digests.Damaged(folder, lines))
    return False
  _check_format(folder)
  if not digests.exists(folder) and str(folder) not in _told:
    _told.add(str(folder))
    log.info("%s has no %s, so it cannot be verified", folder, digests.NAME)
  return True


def meta(step: int, **more: Any) -> "JsonItem":
  """What a checkpoint says about itself."""
  return JsonItem("meta.json", {"format": FORMAT, "step": step, **more})


def _check_format(folder: epath.Path) -> None:
  """Refuses a step whose form this version cannot know.

  An older step of the run is not used instead: that would undo its work.
  """
  path = folder / "meta" / "meta.json"
  found = files.read_json(path) if files.exists(path) else {}
  if found.get("format", 1) > FORMAT:
    raise ValueError(
      f"{folder} was saved by a newer version of blip_jax, in format "
      f"{found['format']}; this version reads formats up to {FORMAT}. Go on "
      "with the newer version"
    )


def steps(root: files.Path) -> list[int]:
  """The steps that a folder of checkpoints holds."""
  if files.is_remote(root):
    return remote_steps.numbers(root)
  if not files.is_folder(root):
    return []
  return [int(name) for name in files.list_folder(root) if name.isdecimal()]


def holds_one(path: str | os.PathLike) -> bool:
  """Whether there is a native checkpoint at a path, complete or not."""
  if files.is_remote(path):
    path = files.as_path(path)
    return digests.exists(path) or bool(
      remote_steps.numbers(path) or files.is_folder(path / FOLDER)
    )
  path = epath.Path(path)
  if _is_step(path) or (path / FOLDER).exists():
    return True
  named = [path / str(step) for step in steps(path)]
  return any(map(_is_step, named or path.glob(f"*{REPLACED}")))


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
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
    _metadata(folder, name),
  )


def shardings(folder: epath.Path, name: str) -> dict[str, str]:
  """How the arrays of one item were split when they were saved, by path.

  Such as `fsdp=2 - tensor=2`, the axes of a mesh that split each dimension;
  dimensions that are not split are `-`, and scalars have none.

  Raises:
    ValueError: the item is missing or broken.
  """
  return {
    path: _sharding_text(leaf.sharding_metadata, len(leaf.shape))
    for path, leaf in by_path(_metadata(folder, name)).items()
  }


def _sharding_text(sharding: Any, rank: int) -> str:
  spec = getattr(sharding, "partition_spec", None)
  if spec is None:  # of arrays that were on one device, or on the host
    return "whole"
  sizes = dict(zip(sharding.axis_names, sharding.shape, strict=True))
  axes = [(axis,) if isinstance(axis, str) else axis or () for axis in spec]
  axes += [()] * (rank - len(axes))  # JAX leaves the last ones out
  return " ".join(
    ",".join(f"{axis}={sizes[axis]}" for axis in names) or "-" for names in axes
  )


def _metadata(folder: epath.Path, name: str) -> Any:
  """What Orbax has written about the arrays of one item."""
  cause = None
  try:
    metadata = ocp.metadata(folder, checkpointable_name=name).metadata
  # Orbax and TensorStore raise many types of errors for an incomplete
  # checkpoint, and for some damage they return None.
  except Exception as error:
    metadata, cause = None, error
  if metadata is None:
    raise _damaged(folder, name) from cause
  return metadata


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
    f"{folder} is not a complete checkpoint: cannot read {name}/ (expected are "
    f"{', '.join(ARRAYS)}, data, meta and config). Delete or move this folder "
    f"to resume from an earlier step"
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
  saved: Mapping[str, Any], expected: Mapping[str, Any]
) -> list[str]:
  """Differences between the arrays of a checkpoint and of a model, as lines."""

  def text(leaf):
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"

  missing = [f" - {path}" for path in sorted(expected.keys() - saved.keys())]
  unexpected = [f" + {path}" for path in sorted(saved.keys() - expected.keys())]
  return [
    *missing,
    *unexpected,
    *(
      f"   {path}: checkpoint {text(saved[path])}, config {text(leaf)}"
      for path, leaf in sorted(expected.items())
      if path in saved and text(saved[path]) != text(leaf)
    ),
  ]


def first_lines(lines: Sequence[str], limit: int = 20) -> str:
  """The first lines: a wrong width differs in every one."""
  rest = len(lines) - limit
  more = [f"   ... and {rest} more"] if rest > 0 else []
  return "\n".join([*lines[:limit], *more])


class Arrays:
  """The arrays of one item of a checkpoint, by path; `params` by default."""

  def __init__(self, folder: epath.Path, item: str = "params"):
    self._folder = folder
    self._item = item
    self.stored = by_path(stored(folder, item))

  @property
  def momentum(self) -> "Arrays | None":
    """The momentum state that was saved with these parameters."""
    exists = (self._folder / "momentum").exists()
    return Arrays(self._folder, "momentum") if exists else None

  def load(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of some paths: with the sharding of each leaf, or in host
    memory where the leaf is a NumPy array."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
      return by_path(load(self._folder, self._item, nested(leaves)))

  def readers(self) -> dict[str, Callable[[], np.ndarray]]:
    """Functions that read each array into host memory.

    Neighbouring arrays are read together, and the next part meanwhile. A caller
    that goes through them in order reads everything once, waits little, and
    holds few parts in memory.
    """
    parts = _parts(self.stored)
    pool, lock = concurrent.futures.ThreadPoolExecutor(1), threading.Lock()

    # Three: an external array may be made of two native ones, from two parts.
    @functools.lru_cache(maxsize=3)
    def part(number):
      leaves = {path: self.stored[path] for path in parts[number]}
      return pool.submit(self.load, _on_host(leaves))

    def read(number, path):
      # Without the lock two threads could begin to read the same part.
      with lock:
        arrays = part(number)
        if number + 1 < len(parts):
          part(number + 1)
      return arrays.result()[path]

    return {
      path: functools.partial(read, number, path)
      for number, paths in enumerate(parts)
      for path in paths
    }

  def __str__(self) -> str:
    return str(self._folder)


def _on_host(tree: Any) -> Any:
  """The tree that makes Orbax return NumPy arrays."""
  return jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), tree)


def _parts(leaves: Mapping[str, jax.ShapeDtypeStruct]) -> list[list[str]]:
  """Paths in groups of `PART_BYTES` at most, or of one larger array."""
  parts, space = [], 0
  for path, leaf in leaves.items():
    size = leaf.size * np.dtype(leaf.dtype).itemsize
    if size > space:
      parts.append([])
      space = PART_BYTES
    parts[-1].append(path)
    space -= size
  return parts


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
