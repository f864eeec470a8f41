"""The members of a tar file, whatever is in it.

A narrow reader, which needs of a header only its name, size and type. Headers
come from strangers: Python's `tarfile` seeks backwards at a negative size,
recurses for each of a chain of headers, reads names of any size into memory,
and stops at a member that claims more than there is. Here offsets only grow,
what is read of a header is bounded, and behind damage the search goes on at the
next header whose checksum is right. So a file is scanned in a time that is
linear in its size.
"""

import os
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from blip_jax.runtime import files

# Longer names, and longer pax headers of a member, are ignored. Linux allows
# paths of 4,096 bytes.
MAX_NAME_BYTES = 1 << 16
MAX_PAX_BYTES = 1 << 20
# Lines of damage that are kept of a file; the others are counted.
MAX_LINES = 1000

_BLOCK = 512
_CHUNK = 1 << 20
_SHOWN = 200
# Headers in front of that of a member: its name, that of a link, pax. Longer
# chains are nobody's, and are ignored.
_MAX_EXTENDED = 8
# Of the map of a sparse file: 1,300 holes.
_MAX_MAP_BYTES = 1 << 15
_OCTAL = re.compile(rb" *([0-7]+) *")
_PAX_LENGTH = re.compile(rb"(\d{1,7}) ")
_PAX_SIZE = re.compile(rb"\d{1,20}")
# Where a header may be: "ustar", and octal digits where its checksum would be.
_HEADER = re.compile(rb"ustar(?<=[0-7 \0]{8}.{101}ustar)", re.DOTALL)
_MAGIC_AT = 257
_GNU_MAGIC = b"ustar  \0"

_FILES = b"07\0"
_FOLDER = b"5"
_NO_CONTENT = b"123456"  # links, devices, folders and pipes
_LONG_NAME, _PAX, _SPARSE = b"L", b"xX", b"S"
# Long names of links, and what is said of all members: an index needs neither.
_SKIPPED = b"Kg"


class Member(NamedTuple):
  """A member, whose content may be nothing.

  Attributes:
    name: as the archive has it, up to the first NUL.
    offset: of its content, in bytes.
    size: of its content.
    is_file: whether the content is that of a file.
    is_folder: whether it is a folder.
  """

  name: str
  offset: int
  size: int
  is_file: bool
  is_folder: bool


class Damage:
  """What is damaged in a file: a bounded number of lines, and a count."""

  def __init__(self, path: str):
    self._path = path
    self._lines: list[str] = []
    self._num_more = 0

  def add(self, detail: str) -> None:
    if len(self._lines) < MAX_LINES:
      self._lines.append(f"{self._path}: {detail}")
    else:
      self._num_more += 1

  @property
  def lines(self) -> list[str]:
    more = [f"{self._path}: {self._num_more} more of these"]
    return self._lines + (more if self._num_more else [])


def members(path: str, damage: Damage) -> Iterator[Member]:
  """Yields the sound members of a tar file, by their offset.

  Args:
    damage: gets what is lost: the member, and why.
  """
  with files.open_read(path) as file:
    yield from _Scan(file, files.size(path), damage).members()


def shown(name: str) -> str:
  """The beginning of a name, for messages."""
  return files.printable(name[:_SHOWN])


class _Header(NamedTuple):
  at: int
  name: bytes
  size: int | None  # None: its field is no size
  type: bytes
  has_map: bool  # of a sparse file, in further blocks

  @property
  def content(self) -> int:
    return self.at + _BLOCK


class _Extended(NamedTuple):
  """What the headers in front of a member say about it."""

  name: bytes = b""
  size: int | None = None
  is_sparse: bool = False
  number: int = 0  # of these headers


class _Scan:
  """One pass over a file."""

  def __init__(self, file: BinaryIO, size: int, damage: Damage):
    self._file, self._size, self._damage = file, size, damage
    self._last: tuple[int, _Header | None] = -1, None

  def members(self) -> Iterator[Member]:
    at, extended, is_reported = 0, _Extended(), False
    while at < self._size:
      header = self._header(at)
      if header is None:
        at, extended = self._skip(at, is_reported), _Extended()
        is_reported = False
        continue
      is_member = header.type not in _LONG_NAME + _PAX + _SKIPPED
      if is_member:
        header = _with(header, extended)
      end = self._end(header)
      if end is None:
        at, extended, is_reported = header.content, _Extended(), True
        continue
      is_reported = False
      if is_member:
        yield _member(header, extended)
        at, extended = end, _Extended()
      else:
        at, extended = end, self._extend(extended, header)

  def _header(self, at: int) -> _Header | None:
    if self._last[0] != at:
      self._last = at, _parsed(at, self._read(at, _BLOCK))
    return self._last[1]

  def _end(self, header: _Header) -> int | None:
    """Where the next header should be; None if the size must be wrong."""
    if header.type in _NO_CONTENT:
      return header.content
    name, size = shown(_decoded(header.name)), header.size
    left = self._size - header.content
    if size is None or size > left:
      announced = "no size" if size is None else f"{size} bytes"
      self._damage.add(
        f"{name}: truncated: the header at byte {header.at} announces "
        f"{announced}, and {left} follow"
      )
      return None
    end = header.content + self._map_size(header) + _padded(size)
    if self._header(end) and not self._lost_content(header):
      return end
    # Either its size is right, and zeros or damage follow; or it is wrong, and
    # other members are where its content should be.
    inside = self._find(header.content, min(end, self._size))
    if inside is None:
      return end
    self._damage.add(
      f"{name}: the header at byte {header.at} announces {size} bytes, but "
      f"another one is at byte {inside}"
    )
    return None

  def _lost_content(self, header: _Header) -> bool:
    """Whether there is another header in place of the content."""
    if not header.size or header.name.endswith(b".tar"):
      return False
    start = self._read(header.content, _BLOCK)
    return _parsed(header.content, start) is not None

  def _map_size(self, header: _Header) -> int:
    size = 0
    while header.has_map and size < _MAX_MAP_BYTES:
      block = self._read(header.content + size, _BLOCK)
      size += _BLOCK
      if not block[504:505].strip(b"\0"):
        break
    return size

  def _extend(self, extended: _Extended, header: _Header) -> _Extended:
    """What is known of the next member after one more header."""
    number = extended.number + 1
    if number > _MAX_EXTENDED:
      if number == _MAX_EXTENDED + 1:
        self._damage.add(
          f"{shown(_decoded(header.name))}: more than {_MAX_EXTENDED} extended "
          f"headers in a row, up to byte {header.at}, are not used"
        )
      return _Extended(number=number)
    extended = extended._replace(number=number)
    if header.type in _SKIPPED:
      return extended
    is_name, size = header.type in _LONG_NAME, header.size or 0
    limit = MAX_NAME_BYTES if is_name else MAX_PAX_BYTES
    try:
      if size > limit:
        raise ValueError(f"{size} bytes, of which at most {limit} are read")
      content = self._read(header.content, size)
      if is_name:
        return extended._replace(name=content)
      return _with_pax(extended, content)
    except ValueError as error:
      name = shown(_decoded(header.name))
      self._damage.add(f"{name}: extended header at byte {header.at}: {error}")
      return extended

  def _skip(self, at: int, is_reported: bool) -> int:
    """Returns where to go on behind what is no header, and reports it.

    Args:
      is_reported: whether it is what a header in front of it announced.
    """
    # Zeros end an archive, which may be followed by another one.
    chunk = self._read(at, _CHUNK)
    zeros = len(chunk) - len(chunk.lstrip(b"\0"))
    if zeros == len(chunk):
      return at + zeros
    if zeros >= _BLOCK:
      return at + zeros // _BLOCK * _BLOCK
    found = self._find(at, self._size)
    end = self._size if found is None else found
    if not is_reported:
      self._damage.add(f"bytes {at} to {end} are not tar members")
    return end

  def _find(self, begin: int, end: int) -> int | None:
    """Returns where the first sound header is that begins there, if any.

    Bytes may have been lost or added, so that may be anywhere in a block.
    """
    for at in range(begin, end, _CHUNK):
      size = min(_CHUNK, end - at)
      chunk = self._read(at, size + _BLOCK)
      for match in _HEADER.finditer(chunk):
        start = match.start() - _MAGIC_AT
        if 0 <= start < size and self._header(at + start):
          return at + start
    return None

  def _read(self, at: int, size: int) -> bytes:
    self._file.seek(at)
    return self._file.read(size)


def _parsed(at: int, block: bytes) -> _Header | None:
  """Returns a header; None if the block is none, or is damaged."""
  checksum = _octal(block[148:156])
  if len(block) < _BLOCK or checksum is None:
    return None
  # Some programs add the bytes as signed numbers.
  rest = block[:148] + b" " * 8 + block[156:]
  total = sum(rest)
  high = sum(byte > 127 for byte in rest) if total != checksum else 0
  if checksum not in (total, total - 256 * high):
    return None
  name, type = block[:100], block[156:157]
  prefix = block[345:500].partition(b"\0")[0]
  is_gnu = block[_MAGIC_AT : _MAGIC_AT + 8] == _GNU_MAGIC
  if prefix and not is_gnu and type not in _LONG_NAME + _SKIPPED + _SPARSE:
    name = prefix + b"/" + name
  if type == b"\0" and name.partition(b"\0")[0].endswith(b"/"):
    type = _FOLDER  # as archives of old had them
  has_map = type in _SPARSE and block[482] > 0
  return _Header(at, name, _number(block[124:136]), type, has_map)


def _octal(field: bytes) -> int | None:
  """The number in a field; None if it is empty or has another form."""
  match = _OCTAL.fullmatch(field.partition(b"\0")[0])
  return int(match[1], 8) if match else None


def _number(field: bytes) -> int | None:
  """The size in a field; None if it is negative or none."""
  if field[:1] == b"\x80":  # GNU's, for 8 GiB and more
    return int.from_bytes(field[1:], "big")
  return _octal(field) if field.partition(b"\0")[0].strip(b" ") else 0


def _with_pax(extended: _Extended, content: bytes) -> _Extended:
  """Reads "LENGTH KEYWORD=VALUE" lines; `ValueError` if they are not these."""
  at = 0
  while at < len(content) and content[at]:
    match = _PAX_LENGTH.match(content, at)
    end = at + int(match[1]) if match else 0
    if not match or not match.end() < end <= len(content):
      raise ValueError(f"no length at {content[at : at + 40]!r}")
    keyword, equals, value = content[match.end() : end].partition(b"=")
    if not equals or not value.endswith(b"\n"):
      raise ValueError(f"no record at {content[at : at + 40]!r}")
    value = value[:-1]
    if keyword == b"path":
      extended = extended._replace(name=value)
    elif keyword == b"size":
      if not _PAX_SIZE.fullmatch(value):
        raise ValueError(f"size {value[:40]!r}")
      extended = extended._replace(size=int(value))
    elif keyword.startswith(b"GNU.sparse."):
      extended = extended._replace(is_sparse=True)
    at = end
  return extended


def _with(header: _Header, extended: _Extended) -> _Header:
  return header._replace(
    name=extended.name or header.name,
    size=header.size if extended.size is None else extended.size,
  )


def _member(header: _Header, extended: _Extended) -> Member:
  return Member(
    _decoded(header.name),
    header.content,
    header.size or 0,
    is_file=header.type in _FILES and not extended.is_sparse,
    is_folder=header.type == _FOLDER,
  )


def _decoded(name: bytes) -> str:
  return os.fsdecode(name.partition(b"\0")[0])


def _padded(size: int) -> int:
  return -(-size // _BLOCK) * _BLOCK
