"""The only door to the file system.

Everything that the package reads or writes goes through here, so that one file
says what a path may be, and what holds for everything written: a reader finds
all of a file or none of it, even after the machine was switched off.

Libraries that open paths themselves (Orbax, PyAV, TFDS, FAISS) are the
exception.
"""

import contextlib
import errno
import functools
import glob as glob_lib
import hashlib
import io
import json
import logging
import math
import os
import pathlib
import re
import shutil
import stat as stat_lib
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from typing import IO, Any, BinaryIO, NamedTuple

from blip_jax.runtime import processes

log = logging.getLogger(__name__)

Path = str | os.PathLike[str]

# File systems allow names of 255 bytes; this leaves room for what is added to
# the name of a file to name what is made of it.
_MAX_STEM_BYTES = 190
# Bytes that are not UTF-8 (half of a surrogate pair, in Python), control
# characters and line ends.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LIKE_AN_ESCAPE = re.compile(r"\\(?=x[0-9a-f]{2})")
_ESCAPE = re.compile(rb"\\x([0-9a-f]{2})")
# See `temporary_path`; a folder that Orbax writes gets a second ending.
_TEMPORARY = re.compile(
  r"\.([0-9a-f]{8})-(\d{1,9})-(\d{1,19})-[0-9a-f]{16}\.tmp"
  r"(\.orbax-checkpoint-tmp)?"
)
_SECONDS_PER_DAY = 86_400
# gs://bucket and the like; one slash is left after pathlib or abspath.
_SCHEME = re.compile(r"(?is)\s*[a-z][a-z0-9+.-]*:/|.*://")
_URL = ("http://", "https://")


class Stat(NamedTuple):
  """What is known of a file without reading it.

  Attributes:
    size: in bytes.
    modified: in seconds since the epoch, by the clock of the file system.
    modified_ns: the same in nanoseconds.
    changed_ns: when its content, name or rights last changed; unlike the time
      of modification, no program can set it.
  """

  size: int
  modified: float
  modified_ns: int
  changed_ns: int


def local(path: Path) -> Path:
  """The path itself, if it is one of a local or mounted file system.

  Without this check, "gs://bucket" would be a folder called "gs:".

  Raises:
    io.UnsupportedOperation: an `OSError` and a `ValueError`: it has a scheme,
      such as gs:// or file://.
  """
  if _SCHEME.match(os.fspath(path)):
    raise io.UnsupportedOperation(
      f"{path}: expected the path of a file or folder, found a URL; gs://, "
      "s3://, file:// and other schemes are not supported: mount or copy what "
      "is there, and give its local path"
    )
  return path


def printable(name: str) -> str:
  r"""A file name as one line of UTF-8; `named` gives the name back.

  Names on disk are bytes. Those that are UTF-8 stay as they are; other bytes,
  and those of control characters and line ends, become `\xNN`. So does a
  backslash before `xNN`: different names stay different.

  This is how ids, JSON, Parquet, logs and reports have every name.
  """
  return one_line(_LIKE_AN_ESCAPE.sub(_escaped, name))


def one_line(text: str) -> str:
  """A text with names in it, such as an error, as one line of UTF-8."""
  return _UNPRINTABLE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
  try:
    raw = match[0].encode("utf-8", "surrogateescape")
  except UnicodeEncodeError:  # JSON can have one that no file name has
    raw = match[0].encode("utf-8", "surrogatepass")
  return "".join(f"\\x{byte:02x}" for byte in raw)


def named(text: str) -> str:
  """The file name that `printable` wrote as this text."""
  raw = _ESCAPE.sub(
    lambda match: bytes.fromhex(match[1].decode()), text.encode()
  )
  return raw.decode("utf-8", "surrogateescape")


def shortened(name: str) -> str:
  """A name to which a file system lets one add 65 bytes.

  The end of a long name gives way to a hash of all of it.
  """
  raw = os.fsencode(name)
  if len(raw) <= _MAX_STEM_BYTES:
    return name
  digest = hashlib.sha256(raw).hexdigest()[:16]
  start = raw[: _MAX_STEM_BYTES - len(digest) - 1].decode("utf-8", "ignore")
  return f"{start}-{digest}"


def _is_web(path: Path) -> bool:
  """Whether it is a URL that callers may download, which is no file yet."""
  return os.fspath(path).startswith(_URL)


def exists(path: Path) -> bool:
  return not _is_web(path) and os.path.exists(local(path))


def is_file(path: Path) -> bool:
  return not _is_web(path) and os.path.isfile(local(path))


def is_folder(path: Path) -> bool:
  return not _is_web(path) and os.path.isdir(local(path))


def is_link(path: Path) -> bool:
  """Whether it is a symbolic link, wherever that leads."""
  return not _is_web(path) and os.path.islink(local(path))


def is_writable(folder: Path) -> bool:
  """Whether this process may create files in a folder."""
  return os.access(local(folder), os.W_OK)


def absolute(path: Path) -> str:
  return os.path.abspath(local(path))


def stat(path: Path) -> Stat:
  """Raises `FileNotFoundError` if there is no such file."""
  found = os.stat(local(path))
  return Stat(
    found.st_size, found.st_mtime, found.st_mtime_ns, found.st_ctime_ns
  )


def size(path: Path) -> int:
  return stat(path).size


def list_folder(folder: Path) -> list[str]:
  """Names of what is in a folder, sorted; empty if there is no folder."""
  try:
    return sorted(os.listdir(local(folder)))
  except FileNotFoundError:
    return []


def entries(folder: Path) -> list[tuple[str, bool, bool]]:
  """What is in a folder, sorted: (name, is a folder, is a link).

  Raises:
    OSError: it cannot be listed.
  """
  with os.scandir(local(folder)) as found:
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

  return os.walk(local(folder), followlinks=True, onerror=fail)


def glob(pattern: str) -> list[str]:
  """Paths that match a pattern with `*`, `?`, `[]` or `**`, sorted."""
  return sorted(glob_lib.glob(str(local(pattern)), recursive=True))


def has_magic(pattern: str) -> bool:
  """Whether a path is a pattern of `glob`."""
  return glob_lib.has_magic(pattern)


def escape(path: str) -> str:
  """A pattern of `glob` that only this path matches."""
  return glob_lib.escape(path)


def real_path(path: Path) -> str:
  """Where a path leads in the end, behind all links."""
  return os.path.realpath(local(path))


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


def read_bytes(path: Path) -> bytes:
  with open_read(path) as file:
    return file.read()


def read_text(path: Path) -> str:
  """Raises `UnicodeDecodeError`, a `ValueError`, if it is no UTF-8."""
  with open(local(path), encoding="utf-8", opener=_regular) as file:
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
  """`size` bytes from `start` on, or as many as there are."""
  with open_read(path) as file:
    file.seek(start)
    return file.read(size)


def sha256(path: Path) -> str:
  """The hash of a file's content, in hexadecimal."""
  with open(local(path), "rb", opener=_regular) as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def open_read(path: Path) -> BinaryIO:
  """A file to read in pieces, and to seek in.

  Raises:
    OSError: it cannot be opened, or is no regular file, as in all functions
      that read.
  """
  return open(local(path), "rb", opener=_regular)


def open_text(path: Path) -> IO[str]:
  """A text file to read line by line; a byte order mark is skipped."""
  return open(local(path), encoding="utf-8-sig", newline=None, opener=_regular)


def open_append(path: Path) -> IO[str]:
  """A text file to write behind its end; flush it to be sure of a line."""
  return open(local(path), "a", encoding="utf-8")


def open_append_bytes(path: Path) -> BinaryIO:
  """A binary file to write behind its end; created if it does not exist."""
  return open(local(path), "ab")


def append_line(path: Path, line: str) -> None:
  with open_append(path) as file:
    file.write(line + "\n")


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
    os.truncate(local(path), sum(map(len, complete_lines(path))))


def complete_lines(path: Path) -> Iterator[bytes]:
  """All lines but a last one that was cut in the middle."""
  with open_read(path) as file:
    for line in file:
      if line.endswith(b"\n"):
        yield line


def temporary_path(path: Path) -> pathlib.Path:
  """A hidden path next to another, for what gets that name when it is complete.

  Processes of several hosts may write the same file, so it is unique. It does
  not contain the name, which may be as long as a name can be. It says which
  process writes it: the next one that writes into the folder deletes what
  processes that were killed have left there.
  """
  folder = pathlib.Path(local(path)).parent
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
  path = pathlib.Path(local(path))
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
  make_folder(pathlib.Path(local(path)).parent)
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
  """Creates a file unless it exists; of several processes, one succeeds."""
  try:
    with open(local(path), "x", encoding="utf-8") as file:
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
  with open(local(path), "r+b") as file:
    if mark.encode() in file.read():
      file.seek(0)
      file.write(content.encode())


def free_bytes(folder: Path) -> int:
  """Free space of the disk that a folder is on."""
  return shutil.disk_usage(local(folder)).free


def make_folder(path: Path) -> None:
  """Creates a folder and those above it; it may exist."""
  os.makedirs(local(path), exist_ok=True)


def make_private_folder(path: Path) -> None:
  """Creates a folder that only its owner can use; it may exist.

  Raises:
    OSError: another user could write there, or replace a folder above it.
  """
  folder = pathlib.Path(os.path.abspath(local(path)))
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
  pathlib.Path(local(path)).unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
  """Deletes a folder with all that is in it; it may be gone."""
  shutil.rmtree(local(path), ignore_errors=True)


def rename(source: Path, target: Path) -> None:
  """Gives a file or folder another name at once; replaces a file there."""
  os.replace(local(source), local(target))
