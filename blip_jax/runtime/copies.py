"""Copies of what is in object stores, for libraries that open paths themselves.

What is on a disk of this machine is not copied: paths of it stay as they are.
"""

import atexit
import concurrent.futures
import functools
import hashlib
import logging
import os
import pathlib
import time
import uuid
from collections.abc import Sequence

from blip_jax.runtime import files, objects

log = logging.getLogger(__name__)

# Files of a folder that are copied at the same time.
_THREADS = 8


def cache_folder() -> pathlib.Path:
  """`$XDG_CACHE_HOME/blip_jax`, or ~/.cache/blip_jax; on this machine."""
  root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(root, "blip_jax").expanduser()


def local_copy(path: files.Path) -> str:
  """The path of a file on this machine: a copy, if it is in an object store.

  The copy is in the cache, and stays until the object is another one. For
  files that are read again and again, in any order.

  Raises:
    FileNotFoundError: there is no such object.
  """
  if not files.is_remote(path):
    return os.fspath(path)
  found, url = files.stat(path), files.absolute(path)
  digest = hashlib.sha256(url.encode()).hexdigest()[:16]
  version = f"{found.size}-{found.changed_ns:x}"
  folder = cache_folder() / "objects" / digest
  target = folder / version / os.path.basename(url)
  if not files.is_file(target):
    log.info("Copying %s (%.1f MB) to %s", url, found.size / 1e6, target)
    earlier = files.list_folder(folder)
    files.make_folder(target.parent)
    with files.open_read(path) as source, files.open_atomic(target) as file:
      while piece := source.read(1 << 22):
        file.write(piece)
    for name in earlier:
      files.remove_folder(folder / name)
  return str(target)


def local_folder(path: files.Path, names: Sequence[str] = ()) -> pathlib.Path:
  """The path of a folder on this machine: a copy, if it is in an object store.

  Args:
    path: of the folder.
    names: of the files in it that are needed; all by default.
  """
  if not files.is_remote(path):
    return pathlib.Path(path)
  folder = (
    scratch_folder() / uuid.uuid4().hex / os.path.basename(files.absolute(path))
  )
  if names:
    for name in {*names} & {*files.list_folder(path)}:
      files.make_folder(folder)
      _copy(files.as_path(path) / name, folder / name)
  else:
    copy_folder(path, folder)
  return folder


@functools.cache
def scratch_folder() -> pathlib.Path:
  """A folder in the cache for this process alone, deleted when it ends.

  If it is killed, the next one does so; see `files.temporary_path`.
  """
  parent = cache_folder() / "scratch"
  files.make_folder(parent)
  folder = files.temporary_path(parent / "scratch")
  files.make_folder(folder)
  atexit.register(files.remove_folder, folder)
  return folder


def copy_folder(
  source: files.Path, target: files.Path, last: Sequence[str] = ()
) -> None:
  """Copies all files of a folder, from or to an object store.

  Args:
    source: the folder.
    target: the new folder; files that are there are replaced.
    last: names of files, relative to the folder, that are copied when all
      others are there: where they are, the folder is complete.
  """
  start = f"{files.absolute(source)}/"
  names = [
    os.path.join(folder, name).removeprefix(start)
    for folder, _, found in files.walk(files.absolute(source))
    for name in found
  ]

  def copy(name: str) -> None:
    to = files.as_path(target) / name
    files.make_folder(to.parent)
    _copy(files.as_path(source) / name, to)

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    list(pool.map(copy, [name for name in names if name not in last]))
  for name in last:
    if name in names:
      copy(name)


def _copy(source: files.Path, target: files.Path) -> None:
  if files.is_remote(target) and not files.is_remote(source):
    return objects.upload(source, target)
  with files.open_read(source) as old, files.open_atomic(target) as new:
    while piece := old.read(1 << 22):
      new.write(piece)


class Mirror:
  """A folder for a library that opens paths itself.

  Attributes:
    target: the folder.
    folder: to write to: the one that is asked for, if it is on a disk, or else
      one on this machine, from which `update` copies.

  Args:
    target: the folder.
  """

  def __init__(self, target: files.Path):
    self.target = target
    self._updated = time.monotonic()
    self.folder = os.fspath(target)
    if files.is_remote(target):
      digest = hashlib.sha256(files.absolute(target).encode()).hexdigest()[:16]
      self.folder = str(scratch_folder() / digest)

  def update(self, seconds: float = 0.0) -> None:
    """Copies what is in the folder to the object store, if it goes there.

    Args:
      seconds: for so long after the last time, this does nothing.
    """
    now = time.monotonic()
    if files.is_remote(self.target) and now >= self._updated + seconds:
      self._updated = now
      copy_folder(self.folder, self.target)
