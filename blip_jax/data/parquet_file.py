"""One Parquet file: its footer, its columns of text, and its row groups.

Whatever a file claims is checked before it is believed, and whatever is
unpacked is measured while it is: some kilobytes can become terabytes. Arrow's
sizes of single columns are not asked for, since a damaged footer makes that
call end the process.
"""

import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
import pyarrow
import pyarrow.parquet
from absl import logging

from blip_jax.data import cells, offsets, rejects, schema
from blip_jax.runtime import files

# A row group with images that is larger once it is unpacked, and so many times
# as large as its file, is a bomb: images do not become smaller when packed.
MAX_GROUP_BYTES = 1 << 30
MAX_EXPANSION = 8
# The same for all text of a file, of which a row may repeat that of others.
MAX_TEXT_BYTES = 1 << 28
MAX_TEXT_EXPANSION = 100
# A footer that claims more rows than this for each byte of its file lies.
MAX_ROWS_PER_BYTE = 1000

# What rows that are unpacked at once may take if each is as large as it can be.
_BATCH_BYTES = 1 << 31
_ROWS_AT_ONCE = 256
_PIECE_BYTES = 1 << 24


class Room:
  """Room in memory, for text of files that threads load at the same time."""

  def __init__(self, size: int):
    self.size = self._left = size
    self._lock = threading.Lock()

  def take(self, size: int) -> bool:
    """Takes room for so many bytes, and returns whether there was as much."""
    with self._lock:
      fits = size < self._left
      if fits:
        self._left -= size
    return fits


class ParquetFile:
  """One file: its footer, and the columns that are needed of it.

  Attributes:
    image: the image column.
    packed: the columns with images and other bytes, read by row group.
    group_bytes: size of the largest row group, as the footer has it.
    text: the other columns by name, once they are loaded.
    cache: where text is unpacked to, if it is large.
    group_ends: the number of rows up to the end of each row group.
    size: of the file, in bytes.
    damaged: number of a row group -> what is wrong with its text.

  Raises:
    ValueError: on opening, if the footer contradicts itself or the file, or a
      column is missing or has another type.
  """

  def __init__(self, path: str, columns: schema.Columns):
    self.path = path
    self.size = files.size(path)
    self.damaged: dict[int, str] = {}
    with files.open_read(path) as file:
      self._footer = footer = pyarrow.parquet.read_metadata(file)
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    self._num_rows = [group.num_rows for group in groups]
    self._check_rows()
    self.group_ends = np.cumsum(self._num_rows)
    self._group_bytes = [group.total_byte_size for group in groups]
    self.group_bytes = max(self._group_bytes, default=0)
    self._fields = fields = footer.schema.to_arrow_schema()
    columns.check(fields.names, path)
    self.image = image = columns.image_key(fields.names, path)
    if image is not None:
      type = fields.field(image).type
      if not _is_encoded(type) and not _is_text(type):
        expected = "a path, bytes or a struct of 'bytes' and 'path'"
        raise _mistake(path, "image", expected, fields.field(image))
    packed = {
      name
      for name in (image, *columns.keep)
      if name is not None and _is_encoded(fields.field(name).type)
    }
    names = {image, columns.image_id_key(fields.names), *columns.keep}
    if columns.with_captions:
      caption = columns.caption_key(fields.names, path)
      if not _is_caption(fields.field(caption).type):
        expected = "text or a list of texts"
        raise _mistake(path, "caption", expected, fields.field(caption))
      names.add(caption)
      packed.discard(caption)  # text, also if it is undecoded
    self.packed = sorted(packed)
    self._text_names = sorted(names - packed - {None})
    kind = f"columns-{offsets.digest(self._text_names)}"
    self.cache = offsets.cache_path(path, kind, ".arrow")

  def _check_rows(self) -> None:
    claimed, most = self._footer.num_rows, MAX_ROWS_PER_BYTE * self.size
    in_groups = sum(self._num_rows)
    if min(self._num_rows, default=0) < 0 or in_groups != claimed:
      raise ValueError(
        f"{self.path}: damaged: the footer has {claimed} rows, and row groups "
        f"of {in_groups} rows"
      )
    if claimed > most:
      raise ValueError(
        f"{self.path}: damaged: the footer has {claimed} rows, expected at "
        f"most {most} in a file of {self.size} bytes"
      )

  def load_text(self, room: Room) -> "ParquetFile":
    """Loads the columns of text: in memory while there is room, else mapped.

    A damaged row group costs only its rows.
    """
    if not self._text_names:
      self.text = {}
      return self
    try:
      table = self._load(room)
    except Exception as error:
      if rejects.hits_all(error):
        raise
      table = self._text_by_group(error)
    self.text = {name: table[name] for name in self._text_names}
    return self

  def _load(self, room: Room) -> pyarrow.Table:
    table = offsets.open_cache(self.cache, _open_arrow)
    if table is None:
      table = self._in_memory(room)
    if table is None:
      logging.info("Unpacking %s of %s, once.", self._text_names, self.path)
      table = offsets.make_cache(self.cache, self._write_arrow, _open_arrow)
    if table is None:  # it cannot be written
      table = pyarrow.concat_tables(list(self._pieces()))
    return table

  def _in_memory(self, room: Room) -> pyarrow.Table | None:
    """The text, or None if there is not as much room."""
    pieces, size = [], 0
    for piece in self._pieces():
      pieces.append(piece)
      size += piece.nbytes
      if size >= room.size:
        return None
    return pyarrow.concat_tables(pieces) if room.take(size) else None

  def _write_arrow(self, file: BinaryIO) -> None:
    with pyarrow.ipc.new_file(file, self._text_fields) as writer:
      for piece in self._pieces():
        writer.write_table(piece)

  def _text_by_group(self, first: Exception) -> pyarrow.Table:
    """The text of sound row groups, and null in the others.

    This is kept in memory, not cached: each start must report the damage.
    """
    fields, left = self._text_fields, self._max_text
    tables = [fields.empty_table()]
    for group, num_rows in enumerate(self._num_rows):
      try:
        table = pyarrow.concat_tables(list(self._group_text(group, left)))
      except Exception as error:
        if rejects.hits_all(error):
          raise
        self.damaged[group] = str(error)
        nulls = [pyarrow.nulls(num_rows, field.type) for field in fields]
        table = pyarrow.table(nulls, schema=fields)
      left -= table.nbytes
      tables.append(table)
    if len(self.damaged) == len(self._num_rows):
      raise first
    return pyarrow.concat_tables(tables)

  @property
  def _max_text(self) -> int:
    return max(MAX_TEXT_BYTES, MAX_TEXT_EXPANSION * self.size)

  @property
  def _text_fields(self) -> pyarrow.Schema:
    types = [_plain(self._fields.field(name).type) for name in self._text_names]
    return pyarrow.schema(list(zip(self._text_names, types, strict=True)))

  def _pieces(self) -> Iterator[pyarrow.Table]:
    """All text, in tables of about `_PIECE_BYTES`."""
    left = self._max_text
    yield self._text_fields.empty_table()
    for group in range(len(self._num_rows)):
      for piece in self._group_text(group, left):
        left -= piece.nbytes
        yield piece

  def _group_text(self, group: int, limit: int) -> Iterator[pyarrow.Table]:
    waiting, size = [], 0
    for batch in self._unpack(group, self._text_names, limit):
      waiting.append(batch)
      size += batch.nbytes
      if size >= _PIECE_BYTES:
        yield self._joined(waiting)
        waiting, size = [], 0
    if waiting:
      yield self._joined(waiting)

  def _joined(self, batches: list[pyarrow.RecordBatch]) -> pyarrow.Table:
    table = pyarrow.Table.from_batches(batches).combine_chunks()
    return table.select(self._text_names).cast(self._text_fields)

  def read_group(self, group: int) -> pyarrow.Table:
    """Unpacks the packed columns of a row group.

    Raises:
      ValueError: it is too large, or has not as many rows as the footer says.
    """
    limit = max(MAX_GROUP_BYTES, MAX_EXPANSION * self.size)
    batches = self._unpack(group, self.packed, limit)
    return pyarrow.Table.from_batches(list(batches))

  def _unpack(
    self, group: int, names: Sequence[str], limit: int
  ) -> Iterator[pyarrow.RecordBatch]:
    """Yields a few rows of a row group at once, up to a number of bytes."""
    # A single row may be as large as all of the group.
    rows = _BATCH_BYTES // max(1, self._group_bytes[group])
    rows = max(1, min(_ROWS_AT_ONCE, rows))
    is_category = lambda name: pyarrow.types.is_dictionary(
      self._fields.field(name).type
    )
    found = size = 0
    # The file is opened each time: thousands of them would reach the limit of
    # open files.
    with files.open_read(self.path) as stream:
      file = pyarrow.parquet.ParquetFile(stream, metadata=self._footer)
      # Every batch of these has a copy of all categories.
      categories = file.read_row_group(
        group, [*filter(is_category, names)], use_threads=False
      )
      others = [*itertools.filterfalse(is_category, names)]
      for batch in file.iter_batches(rows, [group], others, use_threads=False):
        num_rows = batch.num_rows
        for name in categories.column_names:
          column = categories[name].slice(found, num_rows).combine_chunks()
          batch = batch.append_column(name, column.cast(_plain(column.type)))
        found += num_rows
        size += batch.nbytes
        if size > limit:
          raise ValueError(
            f"row group {group} is more than {limit} bytes once it is unpacked"
          )
        yield batch
    if found != self._num_rows[group]:
      raise ValueError(
        f"row group {group} has {found} rows, expected "
        f"{self._num_rows[group]} as in the footer"
      )

  @property
  def problems(self) -> list[str]:
    return [
      f"{self.path}: row group {group}: {error}"
      for group, error in self.damaged.items()
    ]

  def group_of(self, row_number: int) -> int:
    return int(np.searchsorted(self.group_ends, row_number, side="right"))

  def check(self, row_number: int) -> None:
    """Raises `ValueError` if the row's text is damaged."""
    if self.damaged and (group := self.group_of(row_number)) in self.damaged:
      raise ValueError(f"row group {group}: {self.damaged[group]}")

  def __len__(self) -> int:
    return self._footer.num_rows


def _open_arrow(path: files.Path, size: int) -> pyarrow.Table:
  content = pyarrow.memory_map(os.fsencode(path)).read_buffer(size)
  return pyarrow.ipc.open_file(content).read_all()


def _is_encoded(type: pyarrow.DataType) -> bool:
  if pyarrow.types.is_struct(type):
    return "bytes" in type.names
  return _is_bytes(type)


def _is_caption(type: pyarrow.DataType) -> bool:
  if pyarrow.types.is_list(type) or pyarrow.types.is_large_list(type):
    type = type.value_type
    if pyarrow.types.is_struct(type):  # such as Karpathy's sentences
      return not set(cells.TEXTS).isdisjoint(type.names)
  return _is_text(type) or _is_bytes(type)


def _is_text(type: pyarrow.DataType) -> bool:
  return str(_plain(type)) in ("string", "large_string", "string_view")


def _is_bytes(type: pyarrow.DataType) -> bool:
  return str(_plain(type)) in ("binary", "large_binary", "binary_view")


def _mistake(
  path: str, option: str, expected: str, field: pyarrow.Field
) -> ValueError:
  return ValueError(
    f"{path}: expected {expected} under {field.name!r}, found {field.type}. "
    f"?{option}=COLUMN after the file's name selects another column."
  )


def _plain(type: pyarrow.DataType) -> pyarrow.DataType:
  """The type of the values, also of a dictionary (categories in pandas)."""
  return type.value_type if pyarrow.types.is_dictionary(type) else type
