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
from typing import Any

from absl import logging

from blip_jax.data import offsets, rejects, schema, sources
from blip_jax.runtime import files

try:
  import pyarrow

  from blip_jax.data import parquet_file
except ImportError as error:
  raise ImportError(
    "Reading Parquet needs pyarrow: pip install 'blip_jax[parquet]'."
  ) from error

# How many row groups with images are cached: a pass in order reads each group
# once; a shuffled pass rarely hits the cache, whatever its size.
_GROUPS_KEPT = 2
_LARGE_GROUP_BYTES = 1 << 27


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
      open_file = functools.partial(
        parquet_file.ParquetFile, columns=self._columns
      )
      self._files, damage = _usable(pool.map(_attempt(open_file), self.paths))
      room = parquet_file.Room(offsets.MIN_CACHED_BYTES)
      load = _attempt(lambda file: file.load_text(room))
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
      _reopened,
      offsets.checked([file.cache for file in self._files]),
      image=c.image,
      caption=c.caption,
      keep=c.keep,
      needs_image=c.needs_image,
    )
    return reopen, (self.paths, c.image_root, c.with_captions)

  def _warn_of_large_groups(self) -> None:
    size = max(
      (file.group_bytes for file in self._files if file.packed), default=0
    )
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
    return self._files[number].read_group(group)


def _reopened(checked: offsets.Checked, *args: Any, **options: Any) -> Parquet:
  """Opens the files again, in a process that another one has started."""
  offsets.trust(checked)
  return Parquet(*args, **options)


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


def _usable(attempts: Iterable[Any]) -> tuple[list[Any], list[str]]:
  """Splits the results of `_attempt` into files and problems."""
  opened, problems = [], []
  for result in attempts:
    (problems if isinstance(result, str) else opened).append(result)
  return opened, problems
