"""Random access to image-text pairs, in any of the supported formats.

A source has `len()`, can be pickled, and returns records by index:

  image     encoded bytes, the path of a file, or a uint8 array [H, W, 3];
            absent only in references whose images have ids
  caption   str, list of str, or undecoded bytes; absent if the source was
            opened without captions
  image_id  how the annotation identifies the image, in this source alone;
            absent if it does not
  id        where the record comes from, for reports: "train.json:17"

and each column that `keep` names, under its own name. `schema` makes records
of rows.

A mistake in the schema (a key that no row has) is the user's and raises
`ValueError` on opening. A single row that cannot be used raises `BadRow`, which
the loader counts and skips. Images are only read later, in `transforms.decode`.
"""

import abc
import concurrent.futures
import functools
import hashlib
import os
import re
import urllib.parse
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
from absl import logging

from blip_jax.data import rejects, transforms
from blip_jax.runtime import copies, files

Record = dict[str, Any]

# Files are indexed by this many threads: on network storage each header is a
# round trip.
INDEX_THREADS = 16

# More text than this is not read for a row: a line, a text file or member.
MAX_ROW_BYTES = 16 << 20

# A shard's name or a folder may precede it, and an extension may follow.
_COCO_NAME = re.compile(r"(?:.*[/:])?(?:COCO_[a-z]+\d{4}_)?(\d{12})(?:\.\w+)?")


class BadRow(transforms.BadSample):
  """A row that cannot be used, although other rows of its source can.

  Reasons in addition to those of `BadSample`: missing_image, missing_caption,
  missing_column (of those to keep), broken_row, which cannot be parsed or has a
  value of another type, and error, whatever else reading it raises.
  """

  def __init__(self, id: str, reason: str, detail: str):
    super().__init__(reason, detail)
    self.args = (id, reason, detail)  # what unpickling passes
    self.id = id


def as_bad(id: str, error: Exception) -> rejects.Bad:
  """What takes the place of a row that raised an error.

  Whatever a row raises, it would raise again after every restart. It costs that
  row; if all rows raise it, too many are bad.

  Args:
    id: of the row, if the error does not have it.
    error: raised while the row was read, or its image.

  Raises:
    Exception: the error, if it would hit any other row as well.
  """
  if isinstance(error, BadRow):
    return rejects.Bad(error.id, error.reason, error.detail)
  if isinstance(error, transforms.BadSample):
    return rejects.Bad(id, error.reason, error.detail)
  if rejects.hits_all(error):
    raise error
  return rejects.Bad(id, "error", f"{type(error).__name__}: {error}")


def coco_image_id(name: str) -> int | None:
  """Returns the image id in a COCO file name, None if it is no such name.

  COCO_val2014_000000391895.jpg and 000000391895.jpg are image 391895. Only
  names of 12 digits count: other numbers need not identify an image.
  """
  match = _COCO_NAME.fullmatch(name)
  return int(match[1]) if match else None


def image_id(record: Record) -> int | str | None:
  """Returns the image id for COCO's result files, None if there is none.

  The annotation's id takes precedence over the one in the file name.
  """
  if "image_id" in record:
    return record["image_id"]
  return coco_image_id(image_path(record) or record["id"])


def captions(record: Record) -> list[str | bytes]:
  """Returns the captions of a record as a list, also if it has only one."""
  caption = record["caption"]
  return list(caption) if isinstance(caption, (list, tuple)) else [caption]


def usable_captions(
  record: Record,
) -> tuple[list[str | bytes], list[rejects.Bad]]:
  """Returns the captions of a record that are texts, and what others lack.

  A caption is usable if `transforms.clean_text` is. The id of another one in a
  list has its number: "val.json:3#1".
  """
  usable, bad = [], []
  is_list = isinstance(record["caption"], (list, tuple))
  for number, caption in enumerate(captions(record)):
    try:
      transforms.clean_text(caption)
    except transforms.BadSample as error:
      id = f"{record['id']}#{number}" if is_list else record["id"]
      bad.append(rejects.Bad(id, error.reason, error.detail))
    else:
      usable.append(caption)
  return usable, bad


def image_path(record: Record) -> str:
  """Returns the path of the image; "" if it has none, as in shards."""
  image = record.get("image")
  return image if isinstance(image, str) else ""


class Source(abc.ABC):
  """A source whose rows cost only themselves, whatever reading one raises."""

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def _id(self, index: int) -> str:
    """Returns the id of a row, without reading it."""

  @abc.abstractmethod
  def _record(self, index: int, id: str) -> Record:
    """Reads a row; may raise anything."""

  def __getitem__(self, index: int) -> Record:
    """Returns a record; raises `BadRow` or `IndexError`."""
    index = range(len(self))[index]
    id = self._id(index)
    try:
      return self._record(index, id)
    except BadRow:
      raise
    except transforms.BadSample as error:
      raise BadRow(id, error.reason, error.detail) from error
    except Exception as error:
      if rejects.hits_all(error):
        raise
      detail = f"{type(error).__name__}: {error}"
      raise BadRow(id, "error", detail) from error


def read_row(path: str, start: int, size: int) -> bytes:
  """Reads the text of a row: a range of a file.

  Raises:
    BadSample: it has more than `MAX_ROW_BYTES`.
  """
  check_length(f"{path}: byte {start}", size)
  return files.read_range(path, start, size)


def read_small(path: str) -> bytes:
  """Reads a file with the text of a row; raises as `read_row`."""
  raw = files.read_range(path, 0, MAX_ROW_BYTES + 1)
  check_length(path, len(raw))
  return raw


def check_length(where: str, size: int) -> None:
  """Raises `BadSample` if the text of a row has more than `MAX_ROW_BYTES`."""
  if size > MAX_ROW_BYTES:
    detail = (
      f"{where}: expected at most {MAX_ROW_BYTES} bytes of text, found "
      f"{size} or more"
    )
    raise transforms.BadSample("too_long", detail)


class Rows:
  """A selection of rows of a source, in a given order."""

  def __init__(self, source: Any, rows: np.ndarray):
    self._source = source
    self.rows = rows

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> Record:
    return self._source[int(self.rows[index])]


class Noted:
  """Rows that store `note(index, record)` of each record read, in `notes`.

  A batch has only pixels and ids. Who needs more of a record takes it out of
  `notes`, by the record's index.
  """

  def __init__(self, rows: Any, note: Callable[[int, Record], Any]):
    self._rows, self._note = rows, note
    self.notes: dict[int, Any] = {}

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Record:
    record = self._rows[index]
    self.notes[index] = self._note(index, record)
    return record


def row_id(source: Any, row: int) -> str | None:
  """Returns the id of a row, usable or not; None if there is no such row."""
  if isinstance(source, Source):  # without reading the row
    return source._id(row) if 0 <= row < len(source) else None
  try:
    return source[row]["id"]
  except BadRow as bad:
    return bad.id
  except IndexError:
    return None


def image_keys(record: Record) -> list[tuple[str, str]]:
  """Returns keys of a record's image; a row of its source that has one of them
  too is of the same image.

  They are the path of the image and its `image_id`; without both, its content.
  Ids are compared as texts: 7 and "7" are one image.
  """
  image, keys = record.get("image"), []
  if isinstance(image, str | os.PathLike):
    keys.append(("path", os.path.normpath(image)))
  if (annotated := record.get("image_id")) is not None:
    keys.append(("image_id", str(annotated)))
  return keys or [("content", _digest(record["image"]))]


def _digest(image: bytes | np.ndarray) -> str:
  if isinstance(image, np.ndarray):
    prefix = f"{image.dtype} {image.shape}:".encode()
    image = prefix + image.tobytes()
  return hashlib.sha256(image).hexdigest()


def joined(keys_of_rows: Iterable[Iterable[Hashable]]) -> list[list[int]]:
  """Returns the rows of each image: rows that share a key, also through others.

  Images are in the order of their first rows, and so are the rows of each.
  """
  parents: list[int] = []
  row_of_key: dict[Hashable, int] = {}

  def first_row(row: int) -> int:
    while parents[row] != row:
      parents[row] = row = parents[parents[row]]
    return row

  for row, keys in enumerate(keys_of_rows):
    parents.append(row)
    for key in keys:
      one, other = first_row(row), first_row(row_of_key.setdefault(key, row))
      parents[max(one, other)] = min(one, other)
  rows_of_image: dict[int, list[int]] = {}
  for row in range(len(parents)):
    rows_of_image.setdefault(first_row(row), []).append(row)
  return [*rows_of_image.values()]


def image_number(record: Record) -> int:
  """Returns a number below 2**31 that all captions of one image share.

  It is a hash of the image's path. An image without one, as in shards, has that
  of its `image_id` in its source (the record's `source_number`, which the
  loader adds), or else of its content. No other row is read for it: rows of
  different paths are never one image, even if they have one `image_id`. Among
  COCO's 113,287 images, about three pairs are expected to share a number by
  chance.
  """
  kind, key = image_keys(record)[0]
  if kind == "image_id":
    key = f"{record.get('source_number', 0)}:{key}"
  # Names of files and broken JSON may have halves of characters in them.
  return zlib.crc32(key.encode("utf-8", "surrogatepass")) & 0x7FFFFFFF


def first_id(row: Mapping[str, Any], names: Iterable[str]) -> int | str | None:
  """Returns what identifies a row, under the first of these names that does.

  A whole float is an int: pandas makes floats of numbers of which one is
  missing. Text is as `files.printable` writes it.
  """
  for name in names:
    value = row.get(name)
    if isinstance(value, float) and value.is_integer():
      return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
      return value
    if isinstance(value, str) and value:
      return files.printable(value)
  return None


def is_text(value: Any) -> TypeGuard[str]:
  """Whether this is a text in UTF-8; JSON can have halves of characters."""
  if not isinstance(value, str):
    return False
  try:
    value.encode()
  except UnicodeEncodeError:
    return False
  return True


@functools.cache  # a file is opened several times in a job
def warn_once(message: str) -> None:
  logging.warning("%s", files.one_line(message))


def annotation_file(path: str | os.PathLike) -> str:
  """Returns the path of an annotation file, which must exist.

  Of a file in an object store it is that of a copy: rows are read one by one.
  """
  path = os.fspath(path)
  if not files.is_file(path):
    raise ValueError(f"{path}: no such annotation file.")
  return copies.local_copy(path)


def path_of_url(url: str) -> str:
  """Returns the path, below the image root, of an image given by its URL.

  The rule is that of `wget --force-directories`: host, decoded path, "?" and
  query. "https://a.org/x/b%20c.jpg?w=1" becomes "a.org/x/b c.jpg?w=1".

  Raises:
    ValueError: the path would leave the image root.
  """
  parts = urllib.parse.urlsplit(url)
  path = urllib.parse.unquote(parts.path)
  if ".." in path.split("/") or not parts.netloc or "\0" in path:
    raise ValueError(f"no file can be derived from the URL {url!r:.200}")
  if path.endswith("/") or not path:
    path = path.rstrip("/") + "/index.html"
  return parts.netloc + path + ("?" + parts.query if parts.query else "")


def existing(paths: Sequence[str], what: str) -> tuple[str, ...]:
  """Returns the paths, of which there must be at least one.

  Args:
    what: the files, in the error's words.

  Raises:
    ValueError: there are no paths, or files that do not exist.
  """
  with concurrent.futures.ThreadPoolExecutor(INDEX_THREADS) as pool:
    there = [*pool.map(files.is_file, paths)]
  missing = [
    path for path, is_there in zip(paths, there, strict=True) if not is_there
  ]
  if missing or not paths:
    raise ValueError(
      f"{len(missing)} of {len(paths)} {what} do not exist: {missing[:3]}. "
      "A pattern with '*' matches only files that exist."
    )
  return tuple(paths)


def shared_folder(paths: Sequence[str]) -> str:
  """Returns the deepest folder that contains all files, with its slash.

  Paths relative to it are short and still unique.
  """
  # `commonpath` would normalise the paths; with links they may lead elsewhere.
  start = os.path.commonprefix(list(paths))  # noqa: RUF071
  return start[: start.rfind("/") + 1]
