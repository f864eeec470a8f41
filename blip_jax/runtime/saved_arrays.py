"""The arrays of a step on disk: loaded, compared, hashed."""

import concurrent.futures
import functools
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from blip_jax.runtime import saved_items, sharding

# Arrays that are needed one by one are read in parts of this size: Orbax takes
# 30 ms for each read, however small.
PART_BYTES = 2**27


def load_to_host(folder: epath.Path, name: str) -> Any:
  """Loads an item of `ARRAYS` into host memory, as NumPy arrays."""
  return saved_items.load(folder, name, _on_host(stored(folder, name)))


def load_on_mesh(folder: epath.Path, name: str, mesh: jax.sharding.Mesh) -> Any:
  """Loads an item onto a mesh, each shard straight to its device.

  The mesh need not be the one that it was trained on.

  Returns:
    Nested dicts; of `params`, as the model's `init` makes them.
  """
  return saved_items.load(
    folder, name, sharding.abstract_state(stored(folder, name), mesh)
  )


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
    path: _sharding_text(leaf.sharding_metadata)
    for path, leaf in by_path(_metadata(folder, name)).items()
  }


def _sharding_text(sharding: Any) -> str:
  spec = getattr(sharding, "partition_spec", None)
  if spec is None:  # of arrays that were on one device, or on the host
    return "whole"
  sizes = dict(zip(sharding.axis_names, sharding.shape, strict=True))
  axes = [(axis,) if isinstance(axis, str) else axis or () for axis in spec]
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
    raise saved_items.damaged(folder, name) from cause
  return metadata


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
      return by_path(saved_items.load(self._folder, self._item, nested(leaves)))

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
