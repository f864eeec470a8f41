"""Random access to image-text pairs, in any of the supported formats.

A source has `len()`, can be pickled, and returns records by index:

  image     encoded bytes, the path of a file, or a uint8 array [H, W, 3]
  caption   str, list of str, or undecoded bytes; absent if the source was
            opened without captions
  image_id  how the annotation identifies the image; absent if it does not
  id        where the record comes from, for reports: "train.json:17"

and each column that `keep` names, under its own name.

A mistake in the schema (a missing key) is the user's and raises `ValueError`.
A single unreadable row raises `BadRow`, which the loader counts and skips.
Images are only read later, in `transforms.decode`.
"""

import dataclasses
import hashlib
import os
import re
import urllib.parse
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from blip_jax.data import transforms
from blip_jax.runtime import files

Record = dict[str, Any]

# Files are indexed by this many threads: on network storage each header is a
# round trip.
INDEX_THREADS = 16

# The first name that a row has wins; a TFDS builder's features are searched
# for the same caption names.
_IMAGES = ("image", "url", "image_path", "file_name")
CAPTIONS = ("caption", "captions", "text", "texts", "sentences")
# NoCaps says `img_id`, Karpathy's splits `cocoid` and `imgid`. A row's `id` may
# be that of a caption or of the row itself, so it is none of these.
_IMAGE_IDS = ("image_id", "img_id", "cocoid", "imgid")
# Keys that records have a meaning for; `keep` cannot name them.
_RESERVED = ("image", "caption", "id", "image_id")

# Formats without a schema are searched this far for the columns to keep: where
# even more rows lack one, too many rows would be bad anyway.
_SCHEMA_ROWS = 10_000

# A shard's name or a folder may precede it, and an extension may follow.
_COCO_NAME = re.compile(r"(?:.*[/:])?(?:COCO_[a-z]+\d{4}_)?(\d{12})(?:\.\w+)?")


class BadRow(transforms.BadSample):
  """A row that cannot be used, although other rows of its source can.

  Reasons in addition to those of `BadSample`: missing_image, missing_caption,
  missing_column (of those to keep), broken_row.
  """

  def __init__(self, id: str, reason: str, detail: str):
    super().__init__(reason, detail)
    self.args = (id, reason, detail)  # what unpickling passes
    self.id = id


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


def image_path(record: Record) -> str:
  """Returns the path of the image; "" if it is stored in a shard or table."""
  image = record["image"]
  return image if isinstance(image, str) else ""


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
  try:
    return source[row]["id"]
  except BadRow as bad:
    return bad.id
  except IndexError:
    return None


def image_key(record: Record) -> tuple[str, str]:
  """Returns which image a record is of: a key that its other rows share.

  That is the annotation's `image_id` if there is one, else the image's path,
  else its content. Ids are compared as texts: 7 and "7" are one image.
  """
  if (annotated := record.get("image_id")) is not None:
    return "image_id", str(annotated)
  image = record["image"]
  if isinstance(image, str | os.PathLike):
    return "path", os.path.normpath(image)
  if isinstance(image, np.ndarray):
    prefix = f"{image.dtype} {image.shape}:".encode()
    image = prefix + image.tobytes()
  return "content", hashlib.sha256(image).hexdigest()


def image_number(record: Record) -> int:
  """Returns a number below 2**31 that all captions of one image share.

  It is a hash of `image_key`. Among COCO's 113,287 images, about three pairs
  are expected to share a number by chance.
  """
  _, key = image_key(record)
  # Names of files and broken JSON may have halves of characters in them.
  return zlib.crc32(key.encode("utf-8", "surrogatepass")) & 0x7FFFFFFF


@dataclasses.dataclass(frozen=True)
class Columns:
  """Which columns of a row hold what, and the record that they make.

  A row is a mapping from column names to values, whatever the file format.
  `image` (or `url`, `image_path`, `file_name`) is a path or encoded bytes;
  `path_of_url` defines where the image of a URL is expected. `caption` (or
  `captions`, `text`, `texts`, `sentences`) is text or a list of texts.
  `image_id` (or `img_id`, `cocoid`, `imgid`) becomes the record's `image_id`.

  Attributes:
    image_root: folder that relative image paths start from.
    with_captions: whether records have a caption; if not, rows need none.
    image: name of the image's column; None: the first of the usual names.
    caption: name of the caption's column, likewise.
    keep: further columns; the record gets each under its own name, with the
      value that the row has.

  Raises:
    ValueError: `keep` names a key that records have anyway.
  """

  image_root: str = ""
  with_captions: bool = True
  image: str | None = None
  caption: str | None = None
  keep: tuple[str, ...] = ()

  def __post_init__(self):
    object.__setattr__(self, "keep", kept_names(self.keep))

  def image_key(self, columns: Collection[str], where: str) -> str:
    """Returns the image's column; `ValueError` if there is none."""
    return _key(columns, "image", "a path", self.image, _IMAGES, where)

  def caption_key(self, columns: Collection[str], where: str) -> str:
    """Returns the caption's column; `ValueError` if there is none."""
    return _key(columns, "caption", "text", self.caption, CAPTIONS, where)

  def image_id_key(self, columns: Collection[str]) -> str | None:
    return next((key for key in _IMAGE_IDS if key in columns), None)

  def record(self, row: Mapping[str, Any], id: str, where: str) -> Record:
    """Returns the record of a row.

    Args:
      id: the record's id.
      where: file and row, for errors.

    Raises:
      ValueError: the image's or caption's column is missing, or has values of
        another type.
      BadRow: this row has no image, no caption or no value of a kept column.
    """
    record = {"image": self._image(row, id, where), "id": id}
    if self.with_captions:
      record["caption"] = self._caption(row, id, where)
    image_id_key = self.image_id_key(row)
    if image_id_key and row[image_id_key] is not None:
      record["image_id"] = row[image_id_key]
    return record | kept_values(self.keep, row, id, where)

  def _image(self, row: Mapping[str, Any], id: str, where: str) -> str | bytes:
    key = self.image_key(row, where)
    image = row[key]
    if isinstance(image, bytes):
      return image
    if image is None:
      raise BadRow(id, "missing_image", f"{where}: nothing under {key!r}")
    if not isinstance(image, str):
      raise mistake(where, f"a path under {key!r}", image)
    if image.startswith(("http://", "https://")):
      try:
        image = path_of_url(image)
      except ValueError as error:
        raise BadRow(id, "broken_row", f"{where}: {error}") from error
    return os.path.join(self.image_root, image)

  def _caption(
    self, row: Mapping[str, Any], id: str, where: str
  ) -> str | bytes | list[str]:
    key = self.caption_key(row, where)
    caption = row[key]
    if caption is None or caption == []:  # usual in files scraped from the web
      raise BadRow(id, "empty_caption", f"{where}: {caption} under {key!r}")
    texts = caption if isinstance(caption, list) else [caption]
    if not all(isinstance(text, (str, bytes)) for text in texts):
      raise mistake(where, f"text under {key!r}", caption)
    return caption


def kept_names(keep: Sequence[str]) -> tuple[str, ...]:
  """Returns the names of the columns to keep, each once.

  Raises:
    ValueError: a key that records have anyway is among them.
  """
  if isinstance(keep, str):
    raise ValueError(f"keep: expected a tuple of column names, found {keep!r}.")
  names = tuple(dict.fromkeys(keep))
  reserved = [name for name in names if name in _RESERVED]
  if reserved:
    raise ValueError(
      f"keep={list(names)}: {reserved} cannot be kept, because records have "
      "these keys already. ?image=COLUMN&caption=COLUMN selects their columns."
    )
  return names


def check_kept(
  keep: Iterable[str], columns: Collection[str], where: str
) -> None:
  """Raises `ValueError` unless all columns to keep are there."""
  missing = [name for name in keep if name not in columns]
  if missing:
    raise ValueError(
      f"{where}: expected the columns {missing} that 'keep' names, found the "
      f"columns {list(columns)}."
    )


def kept_values(
  keep: Iterable[str], row: Mapping[str, Any], id: str, where: str
) -> Record:
  """Returns the values of the columns to keep, by name.

  Raises:
    BadRow: the row has none under one of the names, or null.
  """
  values = {name: row.get(name) for name in keep}
  for name, value in values.items():
    if value is None:
      detail = f"{where}: nothing under {name!r}, which 'keep' names"
      raise BadRow(id, "missing_column", detail)
  return values


def search_kept(
  keep: Iterable[str],
  columns_of: Callable[[int], Collection[str]],
  num_rows: int,
  where: str,
) -> None:
  """Checks the columns to keep where no schema lists the columns.

  Args:
    columns_of: returns the columns of a row; may raise `BadRow`.
    num_rows: number of rows, of which the first 10,000 are searched.

  Raises:
    ValueError: no row that was searched has one of the columns.
  """
  missing = set(keep)
  columns: dict[str, None] = {}  # ordered
  num_searched = min(num_rows, _SCHEMA_ROWS)
  for index in range(num_searched if missing else 0):
    try:
      columns |= dict.fromkeys(columns_of(index))
    except BadRow:
      continue
    missing -= columns.keys()
    if not missing:
      return
  check_kept(keep, columns, f"{where}: rows 0 to {num_searched - 1}")


def _key(
  columns: Collection[str],
  option: str,
  what: str,
  named: str | None,
  usual: Sequence[str],
  where: str,
) -> str:
  names = (named,) if named else usual
  for name in names:
    if name in columns:
      return name
  first, *others = map(repr, names)
  choice = f"{first} (or {', '.join(others)})" if others else first
  hint = f"?{option}=COLUMN after the file's name selects another column."
  raise mistake(where, f"{what} under {choice}", list(columns), hint)


def mistake(where: str, expected: str, found: Any, hint="") -> ValueError:
  """Returns an error in the schema; `hint` names an option that helps."""
  message = f"{where}: expected {expected}, found {found!r:.200}. {hint}"
  return ValueError(message.rstrip())


def annotation_file(path: str | os.PathLike) -> str:
  """Returns the path of an annotation file, which must exist."""
  path = os.fspath(path)
  if not files.is_file(path):
    raise ValueError(f"{path}: no such annotation file.")
  return path


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
  missing = [path for path in paths if not files.is_file(path)]
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
