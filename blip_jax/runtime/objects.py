"""Files in object stores: S3, Google Cloud Storage and Azure.

The functions are those of `disk.py`, by which `files.py` chooses. A folder is
what names of objects begin with: it exists as long as there is an object in it.
An object appears whole or not at all. There is no rename: what is to appear at
once is one object, and of several the last one says that they are complete.
"""

import atexit
import concurrent.futures
import contextlib
import errno
import fnmatch
import functools
import glob as glob_lib
import io
import logging
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from blip_jax.runtime import blocks, buckets, object_files, paths
from blip_jax.runtime.paths import Address, Path, Stat

log = logging.getLogger(__name__)

# Threads that copy the objects of a folder.
_THREADS = 8


def require(path: Path) -> None:
  """Raises `ImportError` if the library for a path is not installed."""
  buckets.load_obstore(paths.address(path).scheme)


def exists(path: Path) -> bool:
  return is_file(path) or is_folder(path)


def is_file(path: Path) -> bool:
  try:
    buckets.head(paths.address(path))
  except FileNotFoundError:
    return False
  return True


def is_folder(path: Path) -> bool:
  address = paths.address(path)
  obstore, bucket = buckets.client(address)
  with buckets.named(address, "list"):
    prefix = f"{address.name}/" if address.name else None
    for some in obstore.list(bucket, prefix, chunk_size=2):
      if any(each["path"] != address.name for each in some):
        return True
  return not address.name


def is_link(path: Path) -> bool:
  del path
  return False


def is_writable(folder: Path) -> bool:
  """Whether files that help this machine alone belong there: no."""
  del folder
  return False


def absolute(path: Path) -> str:
  return str(paths.address(path))


real_path = absolute


def stat(path: Path) -> Stat:
  """Raises `FileNotFoundError` if there is no such object."""
  address = paths.address(path)
  head = buckets.head(address)
  buckets.pins.renew(str(address), head)
  return head.stat


def _listed(address: Address) -> tuple[list[str], list[str]]:
  """Names of the folders and of the objects in a folder."""
  obstore, bucket = buckets.client(address)
  with buckets.named(address, "list"):
    found = obstore.list_with_delimiter(bucket, address.name or None)
  start = f"{address.name}/" if address.name else ""
  folders = [name.removeprefix(start) for name in found["common_prefixes"]]
  names = [each["path"].removeprefix(start) for each in found["objects"]]
  # An object that stands for the folder itself, as consoles make it.
  own = (address.name, "")
  return folders, [name for name in names if name not in own]


def list_folder(folder: Path) -> list[str]:
  """Names of what is in a folder, sorted; empty if there is no folder."""
  folders, names = _listed(paths.address(folder))
  return sorted({*folders, *names})


def entries(folder: Path) -> list[tuple[str, bool, bool]]:
  """What is in a folder, sorted: (name, is a folder, is a link).

  Raises:
    OSError: it cannot be listed, or there is nothing.
  """
  folders, names = _listed(paths.address(folder))
  if not folders and not names:
    raise FileNotFoundError(errno.ENOENT, "no such folder", str(folder))
  found = dict.fromkeys(names, False) | dict.fromkeys(folders, True)
  return sorted((name, found[name], False) for name in found)


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
  """As `disk.walk`: (folder, its folders, its files)."""
  address = paths.address(folder)
  folders, names = map(sorted, _listed(address))
  yield str(address), folders, names
  for name in folders:
    yield from walk(str(address.child(name)))


def glob(pattern: str) -> list[str]:
  """Paths that match a pattern with `*`, `?` or `[]`, sorted."""
  address = paths.address(pattern)
  found = [address._replace(name="")]
  parts = address.name.split("/")
  for number, part in enumerate(parts):
    if glob_lib.has_magic(part):
      found = [
        each.child(name)
        for each in found
        for name in list_folder(str(each))
        if fnmatch.fnmatchcase(name, part)
        and (part.startswith(".") or not name.startswith("."))
      ]
    else:
      found = [each.child(part) for each in found]
      if number == len(parts) - 1:
        found = [each for each in found if exists(str(each))]
  return sorted(map(str, found))


def _fetch(key: Any, start: int, size: int) -> memoryview:
  url, etag = key
  part = buckets.get(paths.address(url), start, size, etag)
  if part is None:
    return memoryview(b"")
  if not etag and len(part.content) < part.head.stat.size:
    buckets.pins.set(url, part.head.etag)
  return part.content


_ranges = blocks.ReadAhead(_fetch)


def read_range(path: Path, start: int, size: int) -> bytes:
  """`size` bytes from `start` on, or as many as there are.

  Raises:
    buckets.Changed: the object is not the one of earlier parts.
  """
  url = str(paths.address(path))
  return _ranges.read((url, buckets.pins.of(url)), start, size)


def open_read(path: Path) -> io.BufferedReader:
  """An object to read in pieces, and to seek in."""
  return object_files.opened(paths.address(path))


def write_bytes(path: Path, content: bytes) -> None:
  """Writes an object: what is there stays until all is written."""
  buckets.put(paths.address(path), content)


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
  """A file that becomes an object once it is complete, or never."""
  with tempfile.TemporaryFile() as file:
    yield file
    file.seek(0)
    buckets.put(paths.address(path), file)


def open_append_bytes(path: Path) -> io.BufferedIOBase:
  """An object to write behind its end; created if there is none."""
  return object_files.Appended(paths.address(path))


def append_line(path: Path, line: str) -> None:
  file = _appended(str(paths.address(path)))  # a line alone copies all of it
  file.write(line.encode() + b"\n")
  file.flush()


@functools.cache
def _appended(url: str) -> io.BufferedIOBase:
  """An object to which this process appends lines until its end."""
  file = open_append_bytes(url)
  atexit.register(_close, file)
  return file


def _close(file: io.BufferedIOBase) -> None:
  try:
    file.close()
  except OSError as error:  # the process ends: nobody could catch it
    log.error("The last lines are lost: %s", error)


def truncate(path: Path, size: int) -> None:
  """Cuts an object, which is written again."""
  with open_read(path) as file, open_atomic(path) as shorter:
    while size and (piece := file.read(min(size, buckets.PART_BYTES))):
      size -= shorter.write(piece)


def claim(path: Path, content: str) -> bool:
  """Creates an object unless it exists; of several processes, one succeeds."""
  address, raw = paths.address(path), content.encode()
  obstore, bucket = buckets.client(address)
  with buckets.named(address, "write"):
    try:
      obstore.put(bucket, address.name, raw, mode="create")
      return True
    except obstore.exceptions.AlreadyExistsError:
      pass
  # By an earlier try of this request, whose answer was lost?
  with contextlib.suppress(FileNotFoundError), open_read(path) as file:
    return file.read() == raw
  return False


def overwrite(path: Path, mark: str, content: str) -> None:
  """Replaces a small object if it has a mark in it, and is not replaced yet.

  Raises:
    FileNotFoundError: there is no such object.
  """
  address = paths.address(path)
  part = buckets.get(address, 0, 1 << 20)
  if part is None or mark.encode() not in bytes(part.content):
    return
  with contextlib.suppress(buckets.Changed):
    buckets.put(address, content.encode(), part.head.version)


def make_folder(path: Path) -> None:
  """Nothing: a folder is there with its first object."""
  paths.address(path)


def remove(path: Path) -> None:
  """Deletes an object; it may be gone."""
  _delete([paths.address(path)])


def remove_folder(path: Path) -> None:
  """Deletes all objects of a folder; it may be gone."""
  address = paths.address(path)
  assert address.name, "all of a bucket"
  _delete(_below(address))


def _below(address: Address) -> list[Address]:
  """All objects of a folder and its folders, but those that stand for one."""
  obstore, bucket = buckets.client(address)
  with buckets.named(address, "list"):
    return [
      address._replace(name=each["path"])
      for some in obstore.list(bucket, f"{address.name}/")
      for each in some
      if each["path"] != address.name
    ]


def _delete(addresses: list[Address]) -> None:
  if not addresses:
    return
  first = addresses[0]
  obstore, bucket = buckets.client(first)
  with contextlib.suppress(FileNotFoundError), buckets.named(first, "delete"):
    obstore.delete(bucket, [each.name for each in addresses])
  for each in addresses:
    buckets.pins.drop(str(each))


def rename(source: Path, target: Path) -> None:
  """Copies an object, or all of a folder, and deletes what it was; not at once.

  Raises:
    FileNotFoundError: there is nothing.
  """
  old, new = paths.address(source), paths.address(target)
  obstore, bucket = buckets.client(old)
  assert old[:2] == new[:2], (source, target)
  found = [old] if is_file(source) else _below(old)
  if not found:
    raise FileNotFoundError(errno.ENOENT, "no such object", str(old))

  def copy(each: Address) -> None:
    name = new.name + each.name.removeprefix(old.name)
    with buckets.named(new, "write"):
      obstore.copy(bucket, each.name, name)

  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    list(pool.map(copy, found))
  _delete(found)


def upload(source: Path, target: Path) -> None:
  """Makes an object of a local file."""
  with open(source, "rb") as file:
    buckets.put(paths.address(target), file)
