"""Files of local and mounted file systems; see `files.py`, the door to them.

A reader finds all of a file or none of it, even after the machine was switched
off.
"""

import contextlib
import errno
import functools
import glob as glob_lib
import io
import os
import pathlib
import re
import shutil
import stat as stat_lib
import tempfile
import uuid
from collections.abc import Iterator
from typing import BinaryIO

from blip_jax.runtime import processes
from blip_jax.runtime.paths import Path, Stat

# See `temporary_path`; a folder that Orbax writes gets a second ending.
_TEMPORARY = re.compile(
  r"\.([0-9a-f]{8})-(\d{1,9})-(\d{1,19})-[0-9a-f]{16}\.tmp"
  r"(\.orbax-checkpoint-tmp)?"
)
_SECONDS_PER_DAY = 86_400


def exists(path: Path) -> bool:
  return os.path.exists(path)


def is_file(path: Path) -> bool:
  return os.path.isfile(path)


def is_folder(path: Path) -> bool:
  return os.path.isdir(path)


def is_link(path: Path) -> bool:
  """Whether it is a symbolic link, wherever that leads."""
  return os.path.islink(path)


def is_writable(folder: Path) -> bool:
  """Whether this process may create files in a folder."""
  return os.access(folder, os.W_OK)


def absolute(path: Path) -> str:
  return os.path.abspath(path)


def stat(path: Path) -> Stat:
  """Raises `FileNotFoundError` if there is no such file."""
  found = os.stat(path)
  return Stat(
    found.st_size, found.st_mtime, found.st_mtime_ns, found.st_ctime_ns
  )


def list_folder(folder: Path) -> list[str]:
  """Names of what is in a folder, sorted; empty if there is no folder."""
  try:
    return sorted(os.listdir(folder))
  except FileNotFoundError:
    return []


def entries(folder: Path) -> list[tuple[str, bool, bool]]:
  """What is in a folder, sorted: (name, is a folder, is a link).

  Raises:
    OSError: it cannot be listed.
  """
  with os.scandir(folder) as found:
    return sorted(
      (each.name, _is_dir(each), each.is_symlink()) for each in found
    )


def _is_dir(entry: os.DirEntry[str]) -> bool:
  try:
    return entry.is_dir()
  except OSError:  # a link to itself
    return False


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
  """`os.walk` that follows links: (folder, its folders, its files).

  The caller may edit the list of folders, to leave some out.

  Raises:
    OSError: a folder cannot be listed.
  """

  def fail(error: OSError) -> None:
    raise error

  return os.walk(folder, followlinks=True, onerror=fail)


def glob(pattern: str) -> list[str]:
  """Paths that match a pattern with `*`, `?`, `[]` or `**`, sorted."""
  return sorted(glob_lib.glob(str(pattern), recursive=True))


def real_path(path: Path) -> str:
  """Where a path leads in the end, behind all links."""
  return os.path.realpath(path)


def _regular(path: Path, flags: int) -> int:
  """Opens a regular file, as the `opener` of `open`.

  Opening a named pipe would wait for ever, and a device may never end.
  """
  descriptor = os.open(path, flags | os.O_NONBLOCK)
  mode = os.fstat(descriptor).st_mode
  # `open` itself refuses a folder.
  if stat_lib.S_ISREG(mode) or stat_lib.S_ISDIR(mode):
    return descriptor
  os.close(descriptor)
  kinds = {
    stat_lib.S_IFIFO: "a named pipe",
    stat_lib.S_IFCHR: "a device",
    stat_lib.S_IFBLK: "a device",
  }
  found = kinds.get(stat_lib.S_IFMT(mode), "something else")
  raise OSError(
    errno.EINVAL, f"expected a regular file, found {found}", os.fspath(path)
  )


def open_read(path: Path) -> io.BufferedReader:
  """A file to read in pieces, and to seek in.

  Raises:
    OSError: it cannot be opened, or is no regular file, as in all functions
      that read.
  """
  return open(path, "rb", opener=_regular)


def read_range(path: Path, start: int, size: int) -> bytes:
  """`size` bytes from `start` on, or as many as there are."""
  with open_read(path) as file:
    file.seek(start)
    return file.read(size)


def open_append_bytes(path: Path) -> io.BufferedIOBase:
  """A binary file to write behind its end; created if it does not exist."""
  return open(path, "ab")


def append_line(path: Path, line: str) -> None:
  with open_append_bytes(path) as file:
    file.write(line.encode() + b"\n")


def truncate(path: Path, size: int) -> None:
  os.truncate(path, size)


def temporary_path(path: Path) -> pathlib.Path:
  """A hidden path next to another, for what gets that name when it is complete.

  Processes of several hosts may write the same file, so it is unique. It does
  not contain the name, which may be as long as a name can be. It says which
  process writes it: the next one that writes into the folder deletes what
  processes that were killed have left there.
  """
  folder = pathlib.Path(path).parent
  _sweep(folder)
  me = processes.this()
  name = f".{me.machine}-{me.pid}-{me.started}-{uuid.uuid4().hex[:16]}.tmp"
  return folder / name


def is_temporary(name: str) -> bool:
  """Whether this is what a process is writing, or was when it was killed."""
  return _TEMPORARY.fullmatch(name) is not None


@functools.cache  # once per process
def _sweep(folder: pathlib.Path) -> None:
  """Deletes temporary files and folders whose process has ended.

  Of a process on another machine nothing is known. What it has left goes when
  it is a day older than a file that is written now.
  """
  names = [*filter(is_temporary, list_folder(folder))]
  if not names:
    return
  with tempfile.TemporaryFile(dir=folder) as file:
    now = os.fstat(file.fileno()).st_mtime
  for name in names:
    with contextlib.suppress(OSError):  # others sweep too
      writer = _writer(name)
      is_old = now - stat(folder / name).modified > _SECONDS_PER_DAY
      if writer.has_ended() or (is_old and not writer.is_alive()):
        remove_folder(folder / name)
        remove(folder / name)


def _writer(name: str) -> processes.Process:
  """The process that writes a temporary file."""
  match = _TEMPORARY.fullmatch(name)
  assert match
  return processes.Process("", match[1], int(match[2]), int(match[3]))


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
  """A file that gets its name once it is complete and on disk, or never."""
  path = pathlib.Path(path)
  temporary = temporary_path(path)
  try:
    with open(temporary, "wb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except OSError as error:
    if error.filename != str(temporary):
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error
  finally:
    temporary.unlink(missing_ok=True)


def claim(path: Path, content: str) -> bool:
  """Creates a file unless it exists; of several processes, one succeeds."""
  try:
    with open(path, "x", encoding="utf-8") as file:
      file.write(content)
  except FileExistsError:
    return False
  return True


def overwrite(path: Path, mark: str, content: str) -> None:
  """Writes over a small file in place, if it has a mark in it.

  A file that takes the place of that one meanwhile stays as it is.

  Raises:
    FileNotFoundError: there is no such file.
  """
  with open(path, "r+b") as file:
    if mark.encode() in file.read():
      file.seek(0)
      file.write(content.encode())


def free_bytes(folder: Path) -> int:
  """Free space of the disk that a folder is on."""
  return shutil.disk_usage(folder).free


def make_folder(path: Path) -> None:
  """Creates a folder and those above it; it may exist."""
  os.makedirs(path, exist_ok=True)


def make_private_folder(path: Path) -> None:
  """Creates a folder that only its owner can use; it may exist.

  Raises:
    OSError: another user could write there, or replace a folder above it.
  """
  folder = pathlib.Path(os.path.abspath(path))
  folder.parent.mkdir(parents=True, exist_ok=True)
  folder.mkdir(mode=0o700, exist_ok=True)
  for place in (folder, *folder.resolve().parents):
    found = place.stat()
    others_write = found.st_mode & 0o022
    # In a folder such as /tmp, nobody can replace what others have made.
    if place != folder and found.st_mode & stat_lib.S_ISVTX:
      others_write = False
    if others_write or found.st_uid not in (os.getuid(), 0):
      raise PermissionError(
        f"{place}: other users can write there; expected a folder of your own "
        "(chmod go-w)"
      )


@contextlib.contextmanager
def temporary_folder() -> Iterator[pathlib.Path]:
  """A folder on the local disk that is deleted at the end."""
  with tempfile.TemporaryDirectory() as folder:
    yield pathlib.Path(folder)


def remove(path: Path) -> None:
  """Deletes a file; it may be gone."""
  pathlib.Path(path).unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
  """Deletes a folder with all that is in it; it may be gone."""
  shutil.rmtree(path, ignore_errors=True)


def rename(source: Path, target: Path) -> None:
  """Gives a file or folder another name at once; replaces a file there."""
  os.replace(source, target)
