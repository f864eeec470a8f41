"""Digests of the files of a checkpoint, so that damage is found and named.

`digests.json` in the folder of a step has the size and the CRC-32 of every
other file in it. A CRC finds what disks, memory and copies do to files, and
takes a fifth of the time of a cryptographic hash. It does not find forgery.
"""

import concurrent.futures
import functools
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from blip_jax.runtime import files, json_files

NAME = "digests.json"
# Orbax writes these when it gives a folder its final name.
_WRITTEN_LAST = ("_CHECKPOINT_METADATA", "commit_success.txt")
_CHUNK_BYTES = 1 << 22

Path = str | os.PathLike[str]


class Damaged(ValueError):
  """Files of a checkpoint differ from their digests.

  Attributes:
    folder: of the step.
  """

  def __init__(self, folder: Path, lines: Iterable[str]):
    self.folder = os.fspath(folder)
    lines = list(lines)
    more = f", and {len(lines) - 3} more" if len(lines) > 3 else ""
    super().__init__(f"{folder} is damaged: {'; '.join(lines[:3])}{more}")


class Digest(NamedTuple):
  """What is known of a file's content."""

  size: int  # in bytes
  crc32: str  # in hexadecimal

  def __str__(self) -> str:
    return f"{self.size} bytes with CRC-32 {self.crc32}"


def write(folder: Path) -> None:
  """Writes the digests of all files in a folder but those written last.

  Until `complete` adds them, these two are not verified.
  """
  names = [name for name in _names(folder) if name not in _WRITTEN_LAST]
  _save(folder, _map(functools.partial(_digest, folder), names))


def complete(folder: Path) -> None:
  """Adds the files that Orbax writes last, if the folder has digests."""
  if exists(folder):
    names = [name for name in _names(folder) if name in _WRITTEN_LAST]
    written = {name: _digest(folder, name) for name in names}
    _save(folder, {**_load(folder), **written})


def exists(folder: Path) -> bool:
  """Whether a folder has digests; those of earlier versions have none."""
  return files.exists(os.path.join(folder, NAME))


def damage(
  folder: Path, read: Callable[[str], bool] = lambda name: True
) -> list[str]:
  """What differs from the digests, a line per file; none if there are none.

  Args:
    folder: of a step.
    read: whether to compare the content of a file, too, by its name relative to
      the folder. Names and sizes are compared of all files.
  """
  if not exists(folder):
    return []
  try:
    expected = _load(folder)
  except ValueError as error:
    return [str(error)]
  names = set(_names(folder))
  lines = {name: f"{name} is missing" for name in expected.keys() - names}
  for name in names - expected.keys() - set(_WRITTEN_LAST):
    lines[name] = f"{name} was added"
  compared = sorted(names & expected.keys())
  check = functools.partial(_difference, folder, expected, read)
  found = _map(check, compared)
  lines |= {name: line for name, line in found.items() if line}
  return [lines[name] for name in sorted(lines)]


class Verification:
  """Compares the files of a step with their digests, in the background.

  Of several processes, each reads a part of the files. They are verified at
  once: if one of them cannot load what is damaged, the others wait for it.

  Args:
    folder: of a step; "" for nothing to verify.
    items: the folders in it whose files are read; all by default.
  """

  def __init__(self, folder: Path, items: Iterable[str] | None = None):
    self._folder = folder
    self._damage: concurrent.futures.Future[list[str]] | None = None
    if folder:
      read = _share(folder, items)
      pool = concurrent.futures.ThreadPoolExecutor(1, "verification")
      self._damage = pool.submit(damage, folder, read)
      pool.shutdown(wait=False)
    if jax.process_count() > 1:
      self.wait()

  def wait(self) -> None:
    """Waits for the end; every process has to call it.

    Raises:
      Damaged: on every process, if any found damage.
    """
    if self._damage is None:
      return
    lines = self._damage.result()
    self._damage = None
    if jax.process_count() > 1:
      found = np.asarray(multihost_utils.process_allgather(len(lines)))
      others = [f"{np.sum(found)} files, see the logs of other processes"]
      lines = lines or (others if found.any() else [])
    if lines:
      raise Damaged(self._folder, lines)


def check(folder: Path, items: Iterable[str] | None = None) -> None:
  """Compares the files of a step with their digests.

  Args:
    folder: of a step.
    items: the folders in it whose files are read; all by default.

  Raises:
    Damaged: they differ.
  """
  lines = damage(folder, _of(items))
  if lines:
    raise Damaged(folder, lines)


def _of(items: Iterable[str] | None) -> Callable[[str], bool]:
  if items is None:
    return lambda name: True
  chosen = set(items)
  return lambda name: "/" not in name or name.partition("/")[0] in chosen


def _share(folder: Path, items: Iterable[str] | None) -> Callable[[str], bool]:
  """Which files this process reads; large and small ones mix by their names."""
  of_items = _of(items)
  names = sorted(name for name in _names(folder) if of_items(name))
  own = set(names[jax.process_index() :: jax.process_count()])
  return lambda name: name in own


def _names(folder: Path) -> list[str]:
  """Names of all files in a folder and its folders, but for the digests."""
  root = pathlib.Path(folder)
  names = [
    (pathlib.Path(parent) / name).relative_to(root).as_posix()
    for parent, _, found in files.walk(folder)
    for name in found
  ]
  return [
    name for name in names if name != NAME and not files.is_temporary(name)
  ]


def _difference(
  folder: Path,
  expected: Mapping[str, Digest],
  read: Callable[[str], bool],
  name: str,
) -> str:
  path = os.path.join(folder, name)
  try:
    if not files.is_file(path):
      return f"{name} is no regular file"
    size = files.size(path)
    if size != expected[name].size:
      return f"{name}: expected {expected[name].size} bytes, found {size}"
    found = _digest(folder, name) if read(name) else expected[name]
  except OSError as error:
    return f"{name} cannot be read: {error.strerror}"
  if found != expected[name]:
    return f"{name}: expected {expected[name]}, found {found}"
  return ""


def _digest(folder: Path, name: str) -> Digest:
  size, crc = 0, 0
  with files.open_read(os.path.join(folder, name)) as file:
    while chunk := file.read(_CHUNK_BYTES):
      size, crc = size + len(chunk), zlib.crc32(chunk, crc)
  return Digest(size, f"{crc:08x}")


def _map(function: Callable[[str], object], names: Iterable[str]) -> dict:
  """The values of a function by name; files are read in a few threads."""
  names = list(names)
  # Computing a CRC releases the interpreter's lock.
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as p:
    return dict(zip(names, p.map(function, names), strict=True))


def _save(folder: Path, digests: Mapping[str, Digest]) -> None:
  rows = {name: list(digests[name]) for name in sorted(digests)}
  files.write_json(os.path.join(folder, NAME), {"crc32": rows})


def _load(folder: Path) -> dict[str, Digest]:
  """Raises `ValueError` if the file of the digests is itself damaged."""
  path = os.path.join(folder, NAME)
  rows = json_files.read(path, {"crc32": dict}).get("crc32")
  if rows is None or not all(
    isinstance(row, list) and [type(x) for x in row] == [int, str]
    for row in rows.values()
  ):
    raise ValueError(f"{path}: expected a size and a CRC-32 of each file")
  return {name: Digest(*row) for name, row in rows.items()}
