"""What a path may be: of a disk, or the address of an object store; and names.

An address is gs://BUCKET/NAME, s3://BUCKET/NAME or az://CONTAINER/NAME. Of its
two slashes one is enough, since `pathlib` and `os.path.normpath` leave no more.
"""

import hashlib
import io
import os
import pathlib
import posixpath
import re
from typing import NamedTuple

from etils import epath

Path = str | os.PathLike[str]

# File systems allow names of 255 bytes; this leaves room for what is added to
# the name of a file to name what is made of it.
_MAX_STEM_BYTES = 190
# Bytes that are not UTF-8 (half of a surrogate pair, in Python), control
# characters and line ends.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LIKE_AN_ESCAPE = re.compile(r"\\(?=x[0-9a-f]{2})")
_ESCAPE = re.compile(rb"\\x([0-9a-f]{2})")
# gs://bucket and the like; one slash is left after pathlib or abspath, which
# may have put the working directory before it.
_SCHEME = re.compile(r"(?is)\s*[a-z][a-z0-9+.-]*:/|.*(://|/(gs|s3|az):/)")
_ADDRESS = re.compile(r"(gs|s3|az)://?([^/]+)(?:/+(.*))?", re.DOTALL)


class Stat(NamedTuple):
  """What is known of a file without reading it.

  Attributes:
    size: in bytes.
    modified: in seconds since the epoch, by the clock of the file system.
    modified_ns: the same in nanoseconds.
    changed_ns: when its content, name or rights last changed; unlike the time
      of modification, no program can set it. Of an object, a number made of
      its ETag, which says the same.
  """

  size: int
  modified: float
  modified_ns: int
  changed_ns: int


class Address(NamedTuple):
  """The address of an object, or of what the names of objects begin with.

  Attributes:
    scheme: gs, s3 or az.
    bucket: its name; of Azure, that of the container.
    name: of the object, without a slash at its ends; "" for all objects.
  """

  scheme: str
  bucket: str
  name: str

  def __str__(self) -> str:
    return f"{self.scheme}://{self.bucket}/{self.name}".removesuffix("/")

  def child(self, name: str) -> "Address":
    return self._replace(name=f"{self.name}/{name}" if self.name else name)


def is_remote(path: Path) -> bool:
  """Whether a path is the address of an object store."""
  return _ADDRESS.fullmatch(os.fspath(path)) is not None


def address(path: Path) -> Address:
  """The address that a path is; `is_remote` says whether it is one.

  Raises:
    ValueError: it leads out of its bucket.
  """
  match = _ADDRESS.fullmatch(os.fspath(path))
  assert match, path
  name = posixpath.normpath(match[3]) if match[3] else ""
  if name.startswith("..") and name[2:3] in ("", "/"):
    raise ValueError(f"{path}: leads out of its bucket")
  return Address(match[1], match[2], "" if name == "." else name)


def check(path: Path) -> Path:
  """The path itself, if it is one of a disk or an object store.

  Without this check, "hdfs://host" would be a folder called "hdfs:".

  Raises:
    io.UnsupportedOperation: an `OSError` and a `ValueError`: it has another
      scheme, such as hdfs:// or file://.
  """
  return path if is_remote(path) else local(path)


def local(path: Path) -> Path:
  """The path itself, if it is one of a local or mounted file system.

  Raises:
    io.UnsupportedOperation: as `check`; also for gs://, s3:// and az://.
  """
  if is_remote(path):
    raise io.UnsupportedOperation(
      f"{path}: expected the path of a local file or folder, found that of an "
      "object store, which is not supported here: mount or copy what is there, "
      "and give its local path"
    )
  if _SCHEME.match(os.fspath(path)):
    raise io.UnsupportedOperation(
      f"{path}: expected the path of a file or folder, or gs://, s3:// or "
      "az:// with a bucket and a name, found a URL that is not supported: "
      "mount or copy what is there, and give its local path"
    )
  return path


def as_path(path: Path) -> pathlib.PurePath:
  """A path on which `/`, `name` and `parent` work, also if it is an address."""
  if is_remote(path):
    return epath.Path(str(address(path)))
  return pathlib.Path(path)


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
