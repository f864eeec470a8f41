"""Parquet: rows by number, of tables larger than memory.

A Parquet file can only be read one row group at a time, which may be a million
rows. So the columns of text are unpacked once into an Arrow file, which is
mapped: a row then takes microseconds, and no memory. Images stored in the
table stay packed, as they would take as much disk space again; reading one
reads its row group. Other columns than the needed ones are never read.
"""

import bisect
import concurrent.futures
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from blip_jax.data import offsets, rejects, schema, sources
from blip_jax.runtime import files

try:
  import pyarrow
  import pyarrow.parquet
except ImportError as error:
  raise ImportError(
    "Reading Parquet needs pyarrow: pip install 'blip_jax[parquet]'."
  ) from error

# How many row groups with images are cached: a pass in order reads each group
# once; a shuffled pass rarely hits the cache, whatever its size.
_GROUPS_KEPT = 2
_LARGE_GROUP_BYTES = 1 << 27
# A row group that is larger once it is unpacked, and so many times as large as
# its file, is a bomb: images do not become smaller when they are packed.
MAX_GROUP_BYTES = 1 << 30
MAX_EXPANSION = 8
_ROWS_AT_ONCE = 64


class Parquet(sources.Source):
  """Rows of Parquet files, one after the other.

  The image column is text (a path or URL), bytes, or a struct of `bytes` and
  `path`, as in Hugging Face datasets. The caption column is text or a list of
  texts. Columns to keep may be of any type and become Python values. See
  `schema.Columns` for columns and arguments.

  `problems` lists damaged files, and damaged row groups of text; other files
  and other rows stay.

  Raises:
    ValueError: on opening, if a file is missing, or if all are damaged, or
      lack a column or have one of another type.
  """

  def __init__(
    self,
    paths: Sequence[str],
    image_root: str = "",
    with_captions: bool = True,
    *,
    image: str | None = None,
    caption: str | None = None,
    keep: tuple[str, ...] = (),
    needs_image: bool = True,
  ):
    self.paths = sources.existing(paths, "Parquet files")
    self._folder = sources.shared_folder(self.paths)
    self._columns = schema.Columns(
      os.fspath(image_root), with_captions, image, caption, keep, needs_image
    )
    with concurrent.futures.ThreadPoolExecutor(sources.INDEX_THREADS) as pool:
      open_file = functools.partial(_File, columns=self._columns)
      self._files, damage = _usable(pool.map(_attempt(open_file), self.paths))
      text_bytes = sum(file.text_bytes for file in self._files)
      mapped = text_bytes >= offsets.MIN_CACHED_BYTES
      load = _attempt(lambda file: file.load_text(mapped))
      self._files, more = _usable(pool.map(load, self._files))
    damaged_groups = (file.problems for file in self._files)
    self.problems = [*damage, *more, *itertools.chain(*damaged_groups)]
    for line in self.problems:
      logging.warning("Damaged Parquet file: %s", files.one_line(line))
    if not self._files:
      raise ValueError(self.problems[0])
    self._ends = list(itertools.accumulate(map(len, self._files)))
    if not len(self):
      raise ValueError(f"No rows in {paths[0]} and {len(paths) - 1} others.")
    self._group = functools.lru_cache(_GROUPS_KEPT)(self._read_group)
    self._warn_of_large_groups()

  def __reduce__(self):
    # Maps are opened again, not copied into every worker process.
    c = self._columns
    reopen = functools.partial(
      Parquet,
      image=c.image,
      caption=c.caption,
      keep=c.keep,
      needs_image=c.needs_image,
    )
    return reopen, (self.paths, c.image_root, c.with_captions)

  def _warn_of_large_groups(self) -> None:
    size = max(file.packed_bytes for file in self._files)
    if size > _LARGE_GROUP_BYTES:
      logging.warning(
        "%s: reading one image reads up to %.0f MB. Row groups of about 100 "
        "rows (row_group_size=100), or tar shards, are faster.",
        self.paths[0],
        size / 1e6,
      )

  def __len__(self) -> int:
    return self._ends[-1]

  def _find(self, index: int) -> tuple[int, int]:
    """Returns the number of a row's file, and of the row in it."""
    number = bisect.bisect_right(self._ends, index)
    return number, index - self._ends[number] + len(self._files[number])

  def _id(self, index: int) -> str:
    number, row_number = self._find(index)
    path = self._files[number].path
    return f"{files.printable(path.removeprefix(self._folder))}:{row_number}"

  def _record(self, index: int, id: str) -> sources.Record:
    number, row_number = self._find(index)
    file = self._files[number]
    where = f"{file.path}: row {row_number}"
    try:
      file.check(row_number)
      row = {name: text[row_number].as_py() for name, text in file.text.items()}
      if file.packed:
        row |= self._packed(number, row_number)
    except Exception as error:  # Arrow raises almost any
      if rejects.hits_all(error):
        raise
      raise sources.BadRow(id, "broken_row", f"{where}: {error}") from error
    return self._columns.record(row, id, where)

  def _packed(self, number: int, row_number: int) -> dict[str, Any]:
    """Returns the values of the packed columns, by name."""
    file = self._files[number]
    group = file.group_of(row_number)
    columns = self._group(number, group)
    # Counted from the group's end.
    index = row_number - int(file.group_ends[group])
    row = {name: columns[name][index].as_py() for name in file.packed}
    if file.image in row and isinstance(image := row[file.image], dict):
      row[file.image] = image["bytes"] or image.get("path")
    return row

  def _read_group(self, number: int, group: int) -> pyarrow.Table:
    file = self._files[number]
    # The footer was read before. The file is opened each time: thousands of
    # them would reach the limit of open files.
    batches, size = [], 0
    limit = max(MAX_GROUP_BYTES, MAX_EXPANSION * file.size)
    # A row may be as large as all of the packed group.
    rows = MAX_GROUP_BYTES // max(1, file.packed_bytes)
    rows = max(1, min(_ROWS_AT_ONCE, rows))
    with files.open_read(file.path) as stream:
      packed = pyarrow.parquet.ParquetFile(stream, metadata=file.footer)
      for batch in packed.iter_batches(
        rows, [group], file.packed, use_threads=False
      ):
        batches.append(batch)
        size += batch.nbytes
        if size > limit:
          raise ValueError(
            f"row group {group} is more than {limit} bytes once it is unpacked"
          )
    return pyarrow.Table.from_batches(batches)


def _attempt(do: Callable[[Any], Any]) -> Callable[[Any], Any]:
  """A function that returns what `do` raises, as a line about its argument."""

  def attempt(argument: Any) -> Any:
    try:
      return do(argument)
    except Exception as error:
      if rejects.hits_all(error):
        raise
      path = getattr(argument, "path", argument)
      return str(error) if path in str(error) else f"{path}: {error}"

  return attempt


def _usable(attempts: Iterable[Any]) -> tuple[list["_File"], list[str]]:
  """Splits the results of `_attempt` into files and problems."""
  opened, problems = [], []
  for result in attempts:
    (problems if isinstance(result, str) else opened).append(result)
  return opened, problems


class _File:
  """One file: its footer, and the columns that are needed of it.

  Attributes:
    image: the image column.
    packed: the columns with images and other bytes, read by row group.
    packed_bytes: size of these in the largest row group.
    text: the other columns by name, once they are loaded.
    text_bytes: size of these.
    group_ends: the number of rows up to the end of each row group.
    size: of the file, in bytes.
    damaged: number of a row group -> what is wrong with its text.
  """

  def __init__(self, path: str, columns: schema.Columns):
    self.path = path
    self.size = files.size(path)
    self.damaged: dict[int, str] = {}
    self.footer = footer = _footer(path)
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    self.group_ends = np.cumsum([group.num_rows for group in groups])
    fields = footer.schema.to_arrow_schema()
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
    self.text_bytes = sum(_size(group, self._text_names) for group in groups)
    sizes = [_size(group, self.packed) for group in groups]
    self.packed_bytes = max(sizes, default=0)

  def load_text(self, mapped: bool) -> "_File":
    """Loads the columns of text; a damaged row group costs only its rows."""
    try:
      self.text = _unpacked(self.path, self._text_names, mapped)
    except Exception as error:
      if rejects.hits_all(error):
        raise
      self.text = self._text_by_group(error)
    if any(len(column) != len(self) for column in self.text.values()):
      raise ValueError(f"{self.path}: expected {len(self)} rows of text")
    return self

  def _text_by_group(self, first: Exception) -> dict[str, pyarrow.ChunkedArray]:
    """The text of sound row groups, and null in the others.

    This is kept in memory, not cached: each start must report the damage.
    """
    tables = []
    with files.open_read(self.path) as stream:
      file = pyarrow.parquet.ParquetFile(stream, metadata=self.footer)
      fields = _text_schema(file, self._text_names)
      for group in range(self.footer.num_row_groups):
        try:
          table = file.read_row_group(group, self._text_names)
          tables.append(table.select(self._text_names).cast(fields))
        except Exception as error:
          self.damaged[group] = str(error)
          num_rows = self.footer.row_group(group).num_rows
          nulls = [pyarrow.nulls(num_rows, field.type) for field in fields]
          tables.append(pyarrow.table(nulls, schema=fields))
    if len(self.damaged) == len(tables):
      raise first
    table = pyarrow.concat_tables(tables)
    return {name: table[name] for name in self._text_names}

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
    return self.footer.num_rows


def _footer(path: str) -> Any:
  with files.open_read(path) as file:
    return pyarrow.parquet.read_metadata(file)


def _size(group: Any, names: Sequence[str]) -> int:
  """Unpacked size in bytes of columns in a row group, nested ones included."""
  chunks = [group.column(i) for i in range(group.num_columns)]
  return sum(
    chunk.total_uncompressed_size
    for chunk in chunks
    if chunk.path_in_schema.partition(".")[0] in names
  )


def _is_encoded(type: pyarrow.DataType) -> bool:
  if pyarrow.types.is_struct(type):
    return "bytes" in type.names
  return _is_bytes(type)


def _is_caption(type: pyarrow.DataType) -> bool:
  if pyarrow.types.is_list(type) or pyarrow.types.is_large_list(type):
    type = type.value_type
    if pyarrow.types.is_struct(type):  # such as Karpathy's sentences
      return not set(schema.TEXTS).isdisjoint(type.names)
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


def _unpacked(
  path: str, names: list[str], mapped: bool
) -> dict[str, pyarrow.ChunkedArray]:
  if not names:
    return {}
  if mapped:
    table = _mapped(path, names)
  else:
    with files.open_read(path) as file:
      table = pyarrow.parquet.ParquetFile(file).read(names)
  return {name: table[name] for name in names}


def _mapped(path: str, names: list[str]) -> pyarrow.Table:
  """The columns in an Arrow file, which is made where it is not there."""
  kind = f"columns-{offsets.digest(names)}"
  target = offsets.cache_path(path, kind, ".arrow")
  if files.exists(target):
    try:
      return _open_arrow(target)
    except Exception as error:  # Arrow raises almost any on a damaged file
      logging.warning("%s: damaged, and made again: %s", target, error)
  logging.info("Unpacking %s of %s, once.", names, path)
  offsets.write_cache(target, functools.partial(_unpack, path, names))
  return _open_arrow(target)


def _open_arrow(path: files.Path) -> pyarrow.Table:
  file = pyarrow.memory_map(os.fsencode(path))
  return pyarrow.ipc.open_file(file).read_all()


def _text_schema(
  file: pyarrow.parquet.ParquetFile, names: Sequence[str]
) -> pyarrow.Schema:
  types = [_plain(file.schema_arrow.field(name).type) for name in names]
  return pyarrow.schema(list(zip(names, types, strict=True)))


def _unpack(path: str, names: list[str], file: BinaryIO) -> None:
  with files.open_read(path) as stream:
    packed = pyarrow.parquet.ParquetFile(stream)
    fields = _text_schema(packed, names)
    with pyarrow.ipc.new_file(file, fields) as writer:
      for batch in packed.iter_batches(columns=names):
        # Each batch has its own dictionary, which Arrow files do not support.
        writer.write_batch(batch.select(names).cast(fields))
