"""From a row to a record: which columns hold what, in every file format.

A row is a mapping from column names to values. Files come from many hands: any
value of any row may be absent, NaN (as pandas writes an empty cell) or of
another type. That costs its row. Only a column that no row has is an error.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from blip_jax.data import (
  cells,
  dialogs,
  kept_columns,
  questions,
  rejects,
  sources,
  statements,
)
from blip_jax.runtime import files

# The first name that a row has wins; a TFDS builder's features are searched
# for the same caption names.
_IMAGES = ("image", "url", "image_path", "file_name", "video")
CAPTIONS = ("caption", "captions", "text", "texts", "sentences")
# NoCaps says `img_id`, Karpathy's splits `cocoid` and `imgid`, GQA `imageId`. A
# row's `id` may be that of a caption or of the row itself, so it is none of
# these.
_IMAGE_IDS = ("image_id", "img_id", "cocoid", "imgid", "imageId")
# Where a column's value goes in `image_file`, and with how many digits.
_VALUE = re.compile(r"\{(\w+)(?::0?(\d{1,2}))?\}")

# Formats without a schema are searched this far for the columns: where even
# more rows lack one, too many rows would be bad anyway.
_SCHEMA_ROWS = 10_000


@dataclasses.dataclass(frozen=True)
class Columns:
  """Which columns of a row hold what, and the record that they make.

  `image` (or `url`, `image_path`, `file_name`, `video`) is a path or encoded
  bytes;
  `sources.path_of_url` defines where the image of a URL is expected. `caption`
  (or `captions`, `text`, `texts`, `sentences`) is text or a list of texts.
  `image_id` (or `img_id`, `cocoid`, `imgid`) becomes the record's `image_id`.

  Attributes:
    image_root: folder that relative image paths start from.
    with_captions: whether records have a caption; if not, rows need none.
    image: name of the image's column; None: the first of the usual names.
    caption: name of the caption's column, likewise.
    keep: further columns; the record gets each under its own name, with the
      value that the row has.
    needs_image: whether a row without an image is bad, even if it has an
      `image_id`. If not, its record has no `image`.
    with_questions: whether records have a question and its answers; see
      `questions`.
    with_statements: whether records have a statement about two images, in place
      of an image; see `statements`.
    with_dialogs: whether records have a dialog about the image; see `dialogs`.
    image_file: the path of an image by its `image_id`, which is in place of
      "{image_id}", or "{image_id:012}" for 12 digits; likewise by any other
      column, as in "video{video_id}.mp4"; "": rows name paths.
    names: a text file of what names of `image_file` stand for, without their
      endings: lines of a name on disk, and of a name in its place, as in
      MSVD's youtube_mapping.txt; "": for themselves.

  Raises:
    ValueError: `keep` names a key that records have anyway, or `image_file`
      has no place for the `image_id` or another column, or `names` is no such
      file.
  """

  image_root: str = ""
  with_captions: bool = True
  image: str | None = None
  caption: str | None = None
  keep: tuple[str, ...] = ()
  needs_image: bool = True
  with_questions: bool = False
  image_file: str = ""
  with_statements: bool = False
  names: str = ""
  with_dialogs: bool = False
  _on_disk: dict[str, str] = dataclasses.field(init=False, repr=False)

  def __post_init__(self):
    object.__setattr__(self, "keep", kept_columns.names(self.keep))
    names = {name for name, _ in _VALUE.findall(self.image_file)}
    if self.image_file and len(names) != 1:
      raise ValueError(
        "?image_file: expected a path with {image_id}, {image_id:012} or "
        f"another column in it, found {self.image_file!r}"
      )
    object.__setattr__(self, "_on_disk", _names(self.names))

  @property
  def _images(self) -> Sequence[str]:
    return (self.image,) if self.image else _IMAGES

  @property
  def _captions(self) -> Sequence[str]:
    return (self.caption,) if self.caption else CAPTIONS

  def image_key(self, columns: Collection[str], where: str) -> str | None:
    """Returns the image's column; None if there is none and the id will do, or
    rows have two images.

    Raises:
      ValueError: there is none.
    """
    if self.with_statements:
      return None
    if self.image_file:
      self._file_key(columns, where)
      return cells.first(self._images, columns)
    if not self.needs_image and self.image_id_key(columns):
      return cells.first(self._images, columns)
    return _key(columns, "image", "a path", self._images, where)

  def caption_key(self, columns: Collection[str], where: str) -> str:
    """Returns the caption's column; `ValueError` if there is none."""
    return _key(columns, "caption", "text", self._captions, where)

  def image_id_key(self, columns: Collection[str]) -> str | None:
    return cells.first(_IMAGE_IDS, columns)

  def check(self, columns: Collection[str], where: str) -> None:
    """Raises `ValueError` unless all columns that a record needs are there."""
    self.image_key(columns, where)
    if self.with_captions:
      self.caption_key(columns, where)
    if self.with_questions:
      questions.check(columns, where)
    if self.with_statements:
      statements.check(columns, where)
    if self.with_dialogs:
      dialogs.check(columns, where)
    kept_columns.check(self.keep, columns, where)

  def record(
    self, row: Mapping[str, Any], id: str, where: str
  ) -> sources.Record:
    """Returns the record of a row.

    Args:
      id: the record's id.
      where: file and row, for errors.

    Raises:
      BadRow: this row has no image, no caption or no value of a kept column,
        or one of another type.
    """
    record: sources.Record = {"id": id}
    if self.with_statements:
      record["images"] = tuple(
        self._located(image, key, id, where)
        for key, image in statements.images(row, id, where)
      )
      record |= statements.record(row, id, where)
    elif self.needs_image or self._names_image(row):
      record["image"] = self._image(row, id, where)
    if self.with_captions:
      key = cells.first(self._captions, row)
      if key is None:
        detail = _absent(where, self._captions, row)
        raise sources.BadRow(id, "missing_caption", detail)
      record["caption"] = cells.caption(row[key], id, f"{where}: {key!r}")
    if key := self.image_id_key(row):
      number = cells.image_id(row[key], id, f"{where}: {key!r}")
      if number is not None:
        record["image_id"] = number
    if self.with_questions:
      record |= questions.record(row, id, where)
    if self.with_dialogs:
      record |= dialogs.record(row, id, where)
    return record | kept_columns.values(self.keep, row, id, where)

  def _names_image(self, row: Mapping[str, Any]) -> bool:
    """Whether a row has an image, or else no id either."""
    key = cells.first(self._images, row)
    id_key = self.image_id_key(row)
    has_id = id_key is not None and not cells.is_missing(row[id_key])
    return not has_id or (key is not None and not cells.is_missing(row[key]))

  def _image(self, row: Mapping[str, Any], id: str, where: str) -> str | bytes:
    if self.image_file:
      return os.path.join(self.image_root, self._file(row, id, where))
    key = cells.first(self._images, row)
    if key is None:
      detail = _absent(where, self._images, row)
      raise sources.BadRow(id, "missing_image", detail)
    return self._located(row[key], key, id, where)

  def _located(self, image: Any, key: str, id: str, where: str) -> str | bytes:
    """An image as a record has it, from what a row has under `key`."""
    if isinstance(image, bytes):
      return image
    if cells.is_missing(image):
      detail = f"{where}: nothing under {key!r}"
      raise sources.BadRow(id, "missing_image", detail)
    if not isinstance(image, str):
      raise cells.mistake(id, f"{where}: {key!r}", "a path", image)
    if image.startswith(("http://", "https://")):
      try:
        image = sources.path_of_url(image)
      except ValueError as error:
        detail = f"{where}: {error}"
        raise sources.BadRow(id, "broken_row", detail) from error
    return os.path.join(self.image_root, image)

  def _file_key(self, columns: Collection[str], where: str) -> str:
    """The column in `image_file`; `ValueError` if there is none."""
    name = _VALUE.findall(self.image_file)[0][0]
    names = _IMAGE_IDS if name == "image_id" else (name,)
    if (key := cells.first(names, columns)) is None:
      raise ValueError(
        f"{where}: expected the name of an image under {_choice(names)}, for "
        f"{self.image_file!r}, found {list(columns)!r:.200}"
      )
    return key

  def _file(self, row: Mapping[str, Any], id: str, where: str) -> str:
    """The path of an image by its id."""
    try:
      key = self._file_key(row, where)
      name = cells.image_id(row[key], id, f"{where}: {key!r}")
    except ValueError:
      name = None
    if name is None or os.sep in str(name):
      detail = f"{where}: expected the id of an image, found {name!r:.200}"
      raise sources.BadRow(id, "missing_image", detail)
    digits = lambda match: str(name).zfill(int(match[2] or 0))
    file = _VALUE.sub(digits, self.image_file)
    stem, ending = os.path.splitext(file)
    if self.names and stem not in self._on_disk:
      detail = f"{where}: {stem!r} is not in {self.names}"
      raise sources.BadRow(id, "missing_image", detail)
    return self._on_disk.get(stem, stem) + ending


def _names(path: str) -> dict[str, str]:
  """Reads what names stand for; see `Columns.names`."""
  if not path:
    return {}
  text = files.read_bytes(sources.annotation_file(path)).decode("utf-8-sig")
  pairs = [line.split() for line in text.splitlines() if line.strip()]
  wrong = [pair for pair in pairs if len(pair) != 2]
  if wrong:
    raise ValueError(
      f"{path}: expected lines of two names, found {' '.join(wrong[0])!r:.200}"
    )
  return {name: on_disk for on_disk, name in pairs}


def search(
  check: Callable[[Collection[str], str], None],
  columns_of: Callable[[int], Collection[str]],
  num_rows: int,
  where: str,
) -> None:
  """Checks the columns where no schema lists them.

  Args:
    check: raises `ValueError` unless the columns are enough.
    columns_of: returns the columns of a row; may raise `BadRow`.
    num_rows: number of rows, of which the first 10,000 are searched.

  Raises:
    ValueError: a column is in none of the rows searched, or none is readable.
  """
  columns: dict[str, None] = {}  # ordered
  num_searched = min(num_rows, _SCHEMA_ROWS)
  where = f"{where}: rows 0 to {num_searched - 1}"
  unreadable = None
  for index in range(num_searched):
    try:
      found = dict.fromkeys(columns_of(index))
    except Exception as error:  # whatever a single row raises is its own
      if rejects.hits_all(error):
        raise
      unreadable = unreadable or error
      continue
    if found.keys() <= columns.keys():
      continue
    columns |= found
    try:
      return check(columns, where)
    except ValueError:
      continue
  if unreadable and not columns:
    raise ValueError(
      f"{where}: none of these can be read. {unreadable}"
    ) from unreadable
  check(columns, where)


def _key(
  columns: Collection[str],
  option: str,
  what: str,
  names: Sequence[str],
  where: str,
) -> str:
  if (name := cells.first(names, columns)) is not None:
    return name
  raise ValueError(
    f"{where}: expected {what} under {_choice(names)}, found "
    f"{list(columns)!r:.200}. ?{option}=COLUMN after the file's name selects "
    "another column."
  )


def _absent(where: str, names: Sequence[str], row: Mapping[str, Any]) -> str:
  return f"{where}: no {_choice(names)} among {list(row)!r:.200}"


def _choice(names: Sequence[str]) -> str:
  first, *others = map(repr, names)
  return f"{first} (or {', '.join(others)})" if others else first
