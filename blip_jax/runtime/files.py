"""The only door to storage: local and mounted disks, and object stores.

Everything that the package reads or writes goes through here. A path that
begins with gs://, s3:// or az:// is one of an object store (`objects.py`), any
other one of a disk (`disk.py`); `paths.py` says what a path may be. What holds
for everything written: a reader finds all of a file or none of it, even after
the machine was switched off.

Libraries that open paths themselves (Orbax, PyAV, TFDS, FAISS) are the
exception; `copies.py` has what they get of an object store.
"""

import contextlib
import glob as glob_lib
import hashlib
import io
import json
import logging
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from blip_jax.runtime import buckets, disk, objects, paths

Path = paths.Path
Stat = paths.Stat
Unavailable = buckets.Unavailable
as_path = paths.as_path
is_remote = paths.is_remote
local = paths.local
named = paths.named
one_line = paths.one_line
printable = paths.printable
shortened = paths.shortened

make_private_folder = disk.make_private_folder
temporary_folder = disk.temporary_folder
is_temporary = disk.is_temporary

log = logging.getLogger(__name__)

_URL = ("http://", "https://")


def check(path: Path) -> Path:
  """The path itself, if it can be read and written here.

  Raises:
    io.UnsupportedOperation: an `OSError` and a `ValueError`: it has a scheme
      that is not supported.
    ImportError: what its scheme needs is not installed.
  """
  if is_remote(paths.check(path)):
    objects.require(path)
  return path


def _of(path: Path) -> Any:
  """The module with the functions for a path."""
  return objects if is_remote(paths.check(path)) else disk


def _is_web(path: Path) -> bool:
  """Whether it is a URL that callers may download, which is no file yet."""
  return os.fspath(path).startswith(_URL)


def exists(path: Path) -> bool:
  return not _is_web(path) and _of(path).exists(path)


def is_file(path: Path) -> bool:
  return not _is_web(path) and _of(path).is_file(path)


def is_folder(path: Path) -> bool:
  return not _is_web(path) and _of(path).is_folder(path)


def is_link(path: Path) -> bool:
  """Whether it is a symbolic link, wherever that leads."""
  return not _is_web(path) and _of(path).is_link(path)


def is_writable(folder: Path) -> bool:
  """Whether this process may create files in a folder of this machine."""
  return _of(folder).is_writable(folder)


def absolute(path: Path) -> str:
  return _of(path).absolute(path)


def stat(path: Path) -> Stat:
  """Raises `FileNotFoundError` if there is no such file."""
  return _of(path).stat(path)


def size(path: Path) -> int:
  return stat(path).size


def list_folder(folder: Path) -> list[str]:
  """Names of what is in a folder, sorted; empty if there is no folder."""
  return _of(folder).list_folder(folder)


def entries(folder: Path) -> list[tuple[str, bool, bool]]:
  """What is in a folder, sorted: (name, is a folder, is a link).

  Raises:
    OSError: it cannot be listed.
  """
  return _of(folder).entries(folder)


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
  """`os.walk` that follows links: (folder, its folders, its files).

  The caller may edit the list of folders, to leave some out.

  Raises:
    OSError: a folder cannot be listed.
  """
  return _of(folder).walk(folder)


def glob(pattern: str) -> list[str]:
  """Paths that match a pattern with `*`, `?` or `[]`, sorted."""
  return _of(pattern).glob(pattern)


def has_magic(pattern: str) -> bool:
  """Whether a path is a pattern of `glob`."""
  return glob_lib.has_magic(pattern)


def escape(path: str) -> str:
  """A pattern of `glob` that only this path matches."""
  return glob_lib.escape(path)


def real_path(path: Path) -> str:
  """Where a path leads in the end, behind all links."""
  return _of(path).real_path(path)


def read_bytes(path: Path) -> bytes:
  with open_read(path) as file:
    return file.read()


def read_text(path: Path) -> str:
  """Raises `UnicodeDecodeError`, a `ValueError`, if it is no UTF-8."""
  with io.TextIOWrapper(open_read(path), encoding="utf-8") as file:
    return file.read()


class DamagedFile(ValueError):
  """A file that cannot be what was written there: cut, empty or overwritten.

  Attributes:
    path: of the file.
    problem: what is wrong with it.
  """

  def __init__(self, path: Path, problem: str, hint: str = ""):
    self.path, self.problem = path, problem
    super().__init__(
      f"{printable(os.fspath(path))}: damaged: {problem}"
      + (f". {hint}" if hint else "")
    )


def read_json(path: Path) -> Any:
  """Raises `DamagedFile`, a `ValueError`, if it is no JSON."""
  content = read_bytes(path)
  try:
    return json.loads(content)
  except (ValueError, RecursionError) as error:
    problem = f"no JSON: {error}" if content.strip() else "the file is empty"
    raise DamagedFile(path, problem) from error


def read_range(path: Path, start: int, size: int) -> bytes:
  """`size` bytes from `start` on, or as many as there are.

  Raises:
    OSError: also if an object is not the one of earlier ranges any more.
  """
  return _of(path).read_range(path, start, size)


def sha256(path: Path) -> str:
  """The hash of a file's content, in hexadecimal."""
  with open_read(path) as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def open_read(path: Path) -> io.BufferedReader:
  """A file to read in pieces, and to seek in.

  Raises:
    OSError: it cannot be opened, or is no regular file, as in all functions
      that read; while reading, if an object changes.
  """
  return _of(path).open_read(path)


def open_text(path: Path) -> io.TextIOWrapper:
  """A text file to read line by line; a byte order mark is skipped."""
  return io.TextIOWrapper(open_read(path), encoding="utf-8-sig", newline=None)


def open_append(path: Path) -> io.TextIOWrapper:
  """A text file to write behind its end; flush it to be sure of a line.

  An object gets what was flushed within `object_files.APPEND_SECONDS` or so.
  """
  file: Any = open_append_bytes(path)
  return io.TextIOWrapper(file, encoding="utf-8")


def open_append_bytes(path: Path) -> io.BufferedIOBase:
  """A binary file to write behind its end; created if it does not exist."""
  return _of(path).open_append_bytes(path)


def append_line(path: Path, line: str) -> None:
  """Writes a line behind the end of a text file."""
  _of(path).append_line(path, line)


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
  """The objects of a file of JSON lines, without a last line that was cut.

  Lines that are damaged are left out, and the log says how many there were.
  """
  num_damaged = 0
  for line in complete_lines(path):
    try:
      value = json.loads(line)
    except (ValueError, RecursionError):
      value = None
    if isinstance(value, dict):
      yield value
    else:
      num_damaged += 1
  if num_damaged:
    log.warning(
      "%s: left out %d damaged lines", printable(os.fspath(path)), num_damaged
    )


def drop_partial_line(path: Path) -> None:
  """Cuts what a process that was killed left of its last line."""
  if exists(path):
    complete = sum(map(len, complete_lines(path)))
    if complete < size(path):
      _of(path).truncate(path, complete)


def complete_lines(path: Path) -> Iterator[bytes]:
  """All lines but a last one that was cut in the middle."""
  with open_read(path) as file:
    for line in file:
      if line.endswith(b"\n"):
        yield line


def temporary_path(path: Path) -> pathlib.Path:
  """A hidden path next to a local one; see `disk.temporary_path`."""
  return disk.temporary_path(local(path))


def open_atomic(path: Path) -> contextlib.AbstractContextManager[BinaryIO]:
  """A file that gets its name once it is complete and on disk, or never."""
  return _of(path).open_atomic(path)


def write_bytes(path: Path, content: bytes) -> None:
  """Writes a file atomically: what is there stays until all is written."""
  with open_atomic(path) as file:
    file.write(content)


def write_text(path: Path, text: str) -> None:
  write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
  """Writes indented JSON, and the folder it is in.

  Numbers that JSON lacks become the strings "NaN", "Infinity", "-Infinity".
  """
  make_folder(as_path(paths.check(path)).parent)
  write_text(path, json.dumps(jsonable(value), indent=2) + "\n")


def jsonable(value: Any) -> Any:
  """A value with what JSON can say in place of what it cannot."""
  if isinstance(value, Mapping):
    return {str(key): jsonable(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [jsonable(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    # float() of these gives the number back; null would lose which it was.
    if math.isnan(value):
      return "NaN"
    return "Infinity" if value > 0 else "-Infinity"
  return value


def claim(path: Path, content: str) -> bool:
  """Creates a file unless it exists; of several processes, one succeeds.

  Args:
    path: of the file.
    content: that no other process writes there.
  """
  return _of(path).claim(path, content)


def overwrite(path: Path, mark: str, content: str) -> None:
  """Writes over a small file in place, if it has a mark in it.

  A file that takes the place of that one meanwhile stays as it is.

  Raises:
    FileNotFoundError: there is no such file.
  """
  _of(path).overwrite(path, mark, content)


def free_bytes(folder: Path) -> int:
  """Free space of the disk that a local folder is on."""
  return disk.free_bytes(local(folder))


def make_folder(path: Path) -> None:
  """Creates a folder and those above it; it may exist."""
  _of(path).make_folder(path)


def remove(path: Path) -> None:
  """Deletes a file; it may be gone."""
  _of(path).remove(path)


def remove_folder(path: Path) -> None:
  """Deletes a folder with all that is in it; it may be gone."""
  _of(path).remove_folder(path)


def rename(source: Path, target: Path) -> None:
  """Gives a file or folder another name; replaces a file there.

  That happens at once on a disk, and not in an object store.
  """
  paths.check(target)
  _of(source).rename(source, target)
