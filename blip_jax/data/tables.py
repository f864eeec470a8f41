"""CSV and TSV: rows by number, in files of any size.

A quoted field may contain line ends, so a row is not always a line; and web
data has quotes that are never closed, so counting quotes is not enough. Lines
are joined only if that gives a row with as many fields as the header: a stray
quote costs its own row, not those after it.
"""

import csv
import functools
import io
import itertools
import json
import os
import re
from typing import Any

import numpy as np
from jaxtyping import Int

from blip_jax.data import offsets, questions, schema, sources
from blip_jax.runtime import files

# The longest row that spans lines. This bounds how much an unclosed quote can
# swallow, and the time to find out that it does.
_MAX_JOINED_BYTES = 1 << 18
# pandas, Python and SQL write these where there is no value.
_EMPTY = ("nan", "NaN", "None", "null", "NULL", "<NA>")
_LIST_OF_TEXTS = re.compile(r"""\[\s*['"].*['"]\s*\]""", re.DOTALL)


class Csv(sources.Source):
  """Rows of a CSV or TSV file.

  Several captions in one field are a JSON list of texts. A field that contains
  a delimiter, a quote or a line end is quoted, and quotes in it are doubled.
  Columns to keep are texts, empty ones included. See `schema.Columns` for
  columns and arguments.

  Args:
    delimiter: separates fields; None: a tab in .tsv, else a comma.
    columns: names of the columns, joined by commas, of a file without a header
      line: "caption,url". None: the first line names them.
    needs_image, with_questions, image_file, with_statements: see
      `schema.Columns`.

  Raises:
    ValueError: on opening, if a column is missing or there are no rows.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    image_root: str = "",
    with_captions: bool = True,
    *,
    image: str | None = None,
    caption: str | None = None,
    keep: tuple[str, ...] = (),
    delimiter: str | None = None,
    columns: str | None = None,
    needs_image: bool = True,
    with_questions: bool = False,
    image_file: str = "",
    with_statements: bool = False,
  ):
    self.path = sources.annotation_file(path)
    is_tsv = self.path.lower().endswith(".tsv")
    self._delimiter = delimiter or ("\t" if is_tsv else ",")
    if len(self._delimiter) != 1:
      raise ValueError(
        f"{self.path}: expected one character as delimiter, found "
        f"{delimiter!r}."
      )
    self._columns = schema.Columns(
      os.fspath(image_root),
      with_captions,
      image,
      caption,
      keep,
      needs_image,
      with_questions,
      image_file,
      with_statements,
    )
    self._num_header_lines = 0 if columns else 1
    self._header = (
      [name.strip() for name in columns.split(",")]
      if columns
      else _header(self.path, self._delimiter)
    )
    self._check_header("?columns" if columns else "header")
    # Rows depend on these, and so does the name of their index.
    kind = f"rows{ord(self._delimiter)}"
    index, _ = offsets.cached(
      self.path,
      f"{kind}x{len(self._header)}" if columns else kind,
      functools.partial(
        _rows, delimiter=self._delimiter, num_fields=len(self._header)
      ),
    )
    self._rows = offsets.Mapped(index)
    if not len(self):
      raise ValueError(f"{self.path}: there are no rows after the header.")
    if columns:
      schema.search(self._columns.check, self._columns_of, len(self), self.path)

  def _check_header(self, where: str) -> None:
    where = f"{self.path}: {where}"
    header, columns = self._header, self._columns
    if len(header) == 1 and columns.with_captions:
      raise ValueError(
        f"{where}: expected several columns with {self._delimiter!r} between "
        f"them, found {header}. ?delimiter=CHARACTER after the file's name "
        "sets another one."
      )
    try:
      columns.check(header, where)
    except ValueError as error:
      raise ValueError(
        f"{error} ?columns=NAME,NAME names those of a table without a header "
        "line."
      ) from None
    self._image = columns.image_key(header, where)
    self._image_id = columns.image_id_key(header)
    self._caption = None
    if columns.with_captions:
      self._caption = columns.caption_key(header, where)
    needed = (self._image, self._caption, self._image_id, *columns.keep)
    twice = [name for name in needed if name and header.count(name) > 1]
    if twice:
      raise ValueError(
        f"{where}: expected one column of each name, found more under {twice}: "
        f"{header}."
      )

  def _columns_of(self, index: int) -> list[str]:
    self._row(index, "")
    return self._header

  def __len__(self) -> int:
    return len(self._rows.array) - 1 - self._num_header_lines

  def _id(self, index: int) -> str:
    return f"{files.printable(os.path.basename(self.path))}:{index}"

  def _record(self, index: int, id: str) -> sources.Record:
    row, where = self._row(index, id)
    return self._columns.record(row, id, where)

  def _row(self, index: int, id: str) -> tuple[dict[str, Any], str]:
    """Returns the columns of a row, and where it is."""
    first = index + self._num_header_lines
    start, end = (int(n) for n in self._rows.array[first : first + 2])
    where = f"{self.path}: row {index} (byte {start})"
    raw = sources.read_row(self.path, start, end - start)
    try:
      return self._parse(raw), where
    except ValueError as error:
      raise sources.BadRow(id, "broken_row", f"{where}: {error}") from error

  def _parse(self, raw: bytes) -> dict[str, Any]:
    fields = _fields(raw, self._delimiter)
    if len(fields) != len(self._header):
      raise ValueError(
        f"expected {len(self._header)} fields {self._header}, found "
        f"{len(fields)}: {raw!r:.200}. A field with {self._delimiter!r}, a "
        "quote or a line end in it needs quotes around it"
      )
    texts = dict(zip(self._header, fields, strict=True))
    row: dict[str, Any] = {**texts}
    if self._image is not None:
      row[self._image] = _cell(texts[self._image])
    if self._caption:
      row[self._caption] = _texts(texts[self._caption])
    if self._image_id:
      row[self._image_id] = _image_id(texts[self._image_id])
    if self._columns.with_questions:
      for name in (*questions.ANSWERS, questions.WEIGHT):
        if name in texts:
          row[name] = _texts(texts[name])
      for name in questions.IDS:
        if name in texts:
          row[name] = _image_id(texts[name])
    return row


def _fields(raw: bytes, delimiter: str) -> list[str]:
  """Returns the fields of one row; `ValueError` if it is not one row."""
  text = io.StringIO(raw.decode("utf-8"), newline="")
  reader = csv.reader(
    text, delimiter=delimiter, skipinitialspace=True, strict=True
  )
  try:
    rows = [row for row in reader if row]
  except csv.Error as error:
    raise ValueError(f"{error}: {raw!r:.200}") from error
  if len(rows) != 1:
    raise ValueError(f"expected one row, found {len(rows)}: {raw!r:.200}")
  return rows[0]


def _cell(field: str) -> str | None:
  """Returns a field, or None for what programs write into an empty cell."""
  return None if field in _EMPTY else field


def _texts(field: str) -> str | list[Any] | None:
  """Returns the values of a JSON list; the field itself if it is none."""
  if not (field.startswith("[") and field.endswith("]")):
    return _cell(field)
  try:
    texts = json.loads(field)
  except (ValueError, RecursionError) as error:
    if not _LIST_OF_TEXTS.fullmatch(field):
      return field
    raise ValueError(  # a list as Python prints it
      f"expected a JSON list of texts, found {field!r:.200}: {error}"
    ) from error
  are_numbers = all(isinstance(text, (int, float)) for text in texts)
  return field if texts and are_numbers else texts  # "[2019]" is a text


def _image_id(field: str) -> str | int | None:
  """Returns an int if it prints as the field does, else the field."""
  # pandas writes a column of numbers as "7.0" as soon as one is missing.
  digits = field.removesuffix(".0")
  is_number = digits.isdecimal() and str(int(digits)) == digits
  return int(digits) if is_number else _cell(field)


def _header(path: str, delimiter: str) -> list[str]:
  data, first = _open(path)
  # A header that spans several lines is not supported.
  line = bytes(data[first : first + _MAX_JOINED_BYTES]).splitlines()[0]
  try:
    return [name.strip() for name in _fields(line, delimiter)]
  except ValueError as error:
    raise ValueError(
      f"{path}: expected a header line in UTF-8 that names the columns, found "
      f"{line!r:.200}: {error}."
    ) from error


def _open(path: str) -> tuple[np.ndarray, int]:
  # A tab is not blank: it may follow a first column without a name.
  data, first = offsets.open_text(path, blank=b"\r\n")
  if first is None:
    raise ValueError(
      f"{path}: expected a header line that names the columns, found nothing."
    )
  return data, first


def _rows(
  path: str, delimiter: str, num_fields: int
) -> tuple[Int[np.ndarray, "offsets"], list[str]]:
  """Finds the rows, the header included; see `json_index.line_rows`."""
  data, first = _open(path)
  starts = offsets.line_starts(data, first)
  odd = offsets.odd_quotes(data, starts)
  bounds = np.append(starts, len(data))

  def is_row(start: int, end: int) -> bool:
    try:
      return len(_fields(bytes(data[start:end]), delimiter)) == num_fields
    except ValueError:
      return False

  kept = np.ones(len(bounds), bool)
  joined = -1  # the last line that was joined to the one before it
  for line, closing in itertools.pairwise(odd.tolist()):
    start, end = bounds[[line, closing + 1]].tolist()
    if (
      line > joined and end - start <= _MAX_JOINED_BYTES and is_row(start, end)
    ):
      kept[line + 1 : closing + 1] = False
      joined = closing
  return bounds[kept], []
