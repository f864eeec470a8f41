"""Random access to image-text pairs, wherever they lie.

A source has `len()`, can be pickled, and gives by index a record:

  image     encoded bytes, the path of a file, or a uint8 array H W 3
  caption   str, list of str, or undecoded bytes; absent if the source was
            opened without captions
  image_id  what the annotation calls the picture; absent if it says nothing
  id        where the record came from, for reports: "train.json:17"

A mistake in the schema (a key that is missing) is the user's and raises
`ValueError`. A single unreadable row raises `BadRow`, which the loader counts
and skips; pictures are only looked at later, in `transforms.decode`.
"""

import dataclasses
import json
import os
import re
import urllib.parse
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from blip_jax.data import offsets, transforms

Record = dict[str, Any]

# Files are indexed by this many threads: on network storage each header is a
# round trip.
INDEX_THREADS = 16

# First match wins, among the columns of a row; so with captions among the
# features of a TFDS builder.
_IMAGES = ("image", "url", "image_path", "file_name")
CAPTIONS = ("caption", "captions", "text", "texts", "sentences")
# NoCaps says `img_id`. A row's `id` may be that of a caption, so it is last.
_IMAGE_IDS = ("image_id", "img_id", "id")

# A shard's name or a folder may stand before it, and an extension behind.
_COCO_NAME = re.compile(r"(?:.*[/:])?(?:COCO_[a-z]+\d{4}_)?(\d{12})(?:\.\w+)?")


class BadRow(transforms.BadSample):
  """A row that is unreadable although its neighbours are not."""

  def __init__(self, id: str, reason: str, detail: str):
    super().__init__(reason, detail)
    self.args = (id, reason, detail)  # what unpickling passes
    self.id = id


def coco_image_id(name: str) -> int | None:
  """Return the number in a file name of COCO's, None if it is no such name.

  COCO_val2014_000000391895.jpg and 000000391895.jpg are picture 391895; only
  names of 12 digits count, for in others a number need not name a picture.
  """
  found = _COCO_NAME.fullmatch(name)
  return int(found[1]) if found else None


def image_id(record: Record) -> int | str | None:
  """Return what COCO's result files call a picture, None if nothing does.

  What the annotation says wins over the file's name.
  """
  if "image_id" in record:
    return record["image_id"]
  return coco_image_id(image_path(record) or record["id"])


def captions(record: Record) -> list[str | bytes]:
  """Return the texts of a record, which may have one or a list of them."""
  caption = record["caption"]
  return list(caption) if isinstance(caption, (list, tuple)) else [caption]


def image_path(record: Record) -> str:
  """Return where the picture lies; "" if that is in a shard or a table."""
  image = record["image"]
  return image if isinstance(image, str) else ""


class Rows:
  """Some rows of a source, in an order of their own."""

  def __init__(self, source: Any, rows: np.ndarray):
    self._source = source
    self.rows = rows

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, place: int) -> Record:
    return self._source[int(self.rows[place])]


class Noted:
  """Rows of which `note(place, record)` is kept, once read, in `notes`.

  A batch has pixels and ids; who wants to know more of its pictures takes the
  notes of their places out.
  """

  def __init__(self, rows: Any, note: Callable[[int, Record], Any]):
    self._rows, self._note = rows, note
    self.notes: dict[int, Any] = {}

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, place: int) -> Record:
    record = self._rows[place]
    self.notes[place] = self._note(place, record)
    return record


def row_id(source: Any, row: int) -> str | None:
  """Return the id of a row, broken or not; None if there is no such row."""
  try:
    return source[row]["id"]
  except BadRow as bad:
    return bad.id
  except IndexError:
    return None


def image_number(record: Record) -> int:
  """Return what captions of one picture have in common, below 2**31.

  That is made of the annotation's `image_id` if there is one, else of the
  picture's path or content. Of COCO's 113,287 pictures, three pairs are to be
  expected that share a number by chance.
  """
  name = record.get("image_id", record["image"])
  if not isinstance(name, bytes | np.ndarray):
    name = str(name).encode()
  return zlib.crc32(name) & 0x7FFFFFFF


@dataclasses.dataclass(frozen=True)
class Columns:
  """Which columns of a row hold what, and the record that they make.

  A row is a mapping from the names of columns to values, wherever it was read.
  `image` (or `url`, `image_path`, `file_name`) is a path or encoded bytes;
  `path_of_url` says where the picture of a URL is expected. `caption` (or
  `captions`, `text`, `texts`, `sentences`) is text or a list of texts.
  `image_id` (or `img_id`, `id`) is passed on.

  Attributes:
    image_root: what relative paths of pictures start from.
    with_captions: whether records have a caption; rows need none otherwise.
    image: the name of the picture's column; None: the first usual one.
    caption: the name of the caption's column, likewise.
  """

  image_root: str = ""
  with_captions: bool = True
  image: str | None = None
  caption: str | None = None

  def image_key(self, columns: Collection[str], where: str) -> str:
    """Return the picture's column; `ValueError` if there is none."""
    return _key(columns, "image", "a path", self.image, _IMAGES, where)

  def caption_key(self, columns: Collection[str], where: str) -> str:
    """Return the caption's column; `ValueError` if there is none."""
    return _key(columns, "caption", "text", self.caption, CAPTIONS, where)

  def image_id_key(self, columns: Collection[str]) -> str | None:
    return next((key for key in _IMAGE_IDS if key in columns), None)

  def record(self, row: Mapping[str, Any], id: str, where: str) -> Record:
    """Return the record of a row.

    Args:
      id: the record's.
      where: file and row, for errors.

    Raises:
      ValueError: a column is missing, or another type is in it.
      BadRow: this row has no picture or caption.
    """
    record = {"image": self._image(row, id, where), "id": id}
    if self.with_captions:
      record["caption"] = self._caption(row, id, where)
    image_id_key = self.image_id_key(row)
    if image_id_key and row[image_id_key] is not None:
      record["image_id"] = row[image_id_key]
    return record

  def _image(self, row: Mapping[str, Any], id: str, where: str) -> str | bytes:
    key = self.image_key(row, where)
    image = row[key]
    if isinstance(image, bytes):
      return image
    if image is None:
      raise BadRow(id, "missing_image", f"{where}: nothing under {key!r}")
    if not isinstance(image, str):
      raise _mistake(where, f"a path under {key!r}", image)
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
      raise _mistake(where, f"text under {key!r}", caption)
    return caption


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
  knob = f"?{option}=COLUMN behind the file's name names another column."
  raise _mistake(where, f"{what} under {choice}", list(columns), knob)


def _mistake(
  where: str, expected: str, found: Any, knob: str = ""
) -> ValueError:
  message = f"{where}: expected {expected}, found {found!r:.200}. {knob}"
  return ValueError(message.rstrip())


class Annotations:
  """Rows of a JSON list or of JSON lines, as COCO, Flickr30k and BLIP use.

  A row is an object; see `Columns` for its keys and the arguments.

  Raises:
    ValueError: on opening, if the file is no list of rows or is truncated; on
      access, if a row lacks a key or has another type there. Both name the
      file, the row (from 0) and the key.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    image_root: str = "",
    with_captions: bool = True,
    *,
    image: str | None = None,
    caption: str | None = None,
  ):
    self.path = annotation_file(path)
    find = offsets.jsonl_rows if _is_jsonl(self.path) else offsets.json_rows
    self._columns = Columns(
      os.fspath(image_root), with_captions, image, caption
    )
    self._rows = offsets.Mapped(offsets.cached(self.path, "rows", find)[0])

  def __len__(self) -> int:
    return len(self._rows.array) - 1

  def __getitem__(self, index: int) -> Record:
    index = range(len(self))[index]
    id = f"{os.path.basename(self.path)}:{index}"
    return self._columns.record(
      self._parse(index, id), id, f"{self.path}: row {index}"
    )

  def _parse(self, index: int, id: str) -> dict[str, Any]:
    start, end = (int(n) for n in self._rows.array[index : index + 2])
    raw = offsets.read_span(self.path, start, end - start)
    try:
      row = json.loads(raw.decode("utf-8").rstrip().removesuffix(","))
    except (ValueError, RecursionError) as error:  # ValueError: also UTF-8
      detail = f"{self.path}: row {index} (byte {start}): {error}"
      raise BadRow(id, "broken_row", detail) from error
    if not isinstance(row, dict):
      raise _mistake(f"{self.path}: row {index}", "an object", row)
    return row


def annotation_file(path: str | os.PathLike) -> str:
  """Return the path of a file that has to be there."""
  path = os.fspath(path)
  if not os.path.isfile(path):
    raise ValueError(f"{path}: no such annotation file.")
  return path


def _is_jsonl(path: str) -> bool:
  return path.lower().endswith(".jsonl")


def path_of_url(url: str) -> str:
  """Return where a picture lies that was downloaded by its URL.

  The rule is that of `wget --force-directories`: host, decoded path, "?" and
  query. "https://a.org/x/b%20c.jpg?w=1" lies at "a.org/x/b c.jpg?w=1".

  Raises:
    ValueError: the URL would lead out of the image root.
  """
  parts = urllib.parse.urlsplit(url)
  path = urllib.parse.unquote(parts.path)
  if ".." in path.split("/") or not parts.netloc or "\0" in path:
    raise ValueError(f"no file can be derived from the URL {url!r:.200}")
  if path.endswith("/") or not path:
    path = path.rstrip("/") + "/index.html"
  return parts.netloc + path + ("?" + parts.query if parts.query else "")


def existing(paths: Sequence[str], what: str) -> tuple[str, ...]:
  """Return files that all have to be there, and be some."""
  missing = [path for path in paths if not os.path.isfile(path)]
  if missing or not paths:
    raise ValueError(
      f"{len(missing)} of {len(paths)} {what} do not exist: {missing[:3]}. "
      "A pattern with '*' takes those that are there."
    )
  return tuple(paths)


def shared_folder(paths: Sequence[str]) -> str:
  """Return the folder that all files lie in, up to its slash.

  Without it their names are short and still tell them apart.
  """
  # Paths are cut as they are written: what `commonpath` tidies may be another
  # place, behind a link.
  start = os.path.commonprefix(list(paths))  # noqa: RUF071
  return start[: start.rfind("/") + 1]
