"""Work units: the parts of a collection that processes label one at a time.

Each tar shard or Parquet file is a work unit. Sources without shards
(annotations, folders, TFDS) are cut into ranges of rows. If a folder has a
table (metadata.csv), the rows are those of the table.
"""

import collections
import contextlib
import dataclasses
import functools
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from blip_jax.data import datasets, folders, rejects, sources
from blip_jax.data import specs as specs_lib
from blip_jax.runtime import files

log = logging.getLogger(__name__)


class Unusable(Exception):
  """The input of a work unit cannot be read, or changed while it was read.

  Another try may succeed, unlike with input that is damaged.
  """


class Input(NamedTuple):
  """The input of a work unit at one time.

  Attributes:
    fingerprint: what identifies it.
    stat: of its file, if it is one.
  """

  fingerprint: dict[str, Any]
  stat: files.Stat | None

  def as_json(self) -> dict[str, Any]:
    """The fingerprint, with the times by which a file is known again unread."""
    return self.fingerprint | (_times(self.stat) if self.stat else {})


@dataclasses.dataclass(frozen=True)
class WorkUnit:
  """A part of a collection.

  Attributes:
    name: of its output files; depends on the input alone.
    spec: the source that it is part of.
    image_root: folder that relative image paths start from.
    with_texts: whether to read web texts.
    rows: of the source, [start, end); None: all.
  """

  name: str
  spec: str
  image_root: str = ""
  with_texts: bool = True
  rows: tuple[int, int] | None = None

  def open(self) -> tuple[sources.Rows, list[str]]:
    """Opens its records, and lists what is damaged in its input.

    Returns:
      Records of `datasets.open_source`, but with a list of texts under
      `caption`, and `no_text`, the reason, where the text is missing or
      unusable; and the damage.
    """
    no_rows = sources.Rows((), np.arange(0))
    try:
      source = _ImagesWithTexts(self.spec, self.image_root, self.with_texts)
    except Exception as error:
      if rejects.hits_all(error):
        raise
      # A damaged shard, whose readers may raise anything. `find` would have
      # failed on damaged annotations.
      kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}:"
      return no_rows, [f"{kind} {error}".strip()]
    rows = np.arange(*(self.rows or (0, len(source))))
    return sources.Rows(source, rows), source.problems

  def fingerprint(self) -> dict[str, Any]:
    """Identifies the input: spec, rows, and the hash if it is one file.

    Of a folder it is that of its table, if it has one. Image files that
    annotations or a table refer to are not hashed.
    """
    fingerprint = {"source": self.spec, "rows": self.rows and list(self.rows)}
    if files.is_file(path := self._path):
      fingerprint |= {"bytes": files.size(path), "sha256": files.sha256(path)}
    return fingerprint

  @property
  def _path(self) -> str:
    return specs_lib.path_of(_rows_of(self.spec, "")[0])

  def _stat(self) -> files.Stat | None:
    return files.stat(self._path) if files.is_file(self._path) else None

  def input(self) -> Input:
    """What the input is now; raises `Unusable` if it cannot be read."""
    try:
      return Input(stat=self._stat(), fingerprint=self.fingerprint())
    except OSError as error:
      if rejects.hits_all(error):
        raise
      raise Unusable(f"{self._path}: {error}") from error

  def check_unchanged(self, before: Input) -> None:
    """Raises `Unusable` if the input is not what it was.

    A file is only read if its size or one of its times is another one.
    """
    try:
      is_equal = self._stat() == before.stat
    except FileNotFoundError:
      is_equal = False
    if is_equal:
      return
    now = self.input().fingerprint
    if now != before.fingerprint:
      raise Unusable(
        f"{self._path}: changed while it was labelled: it was "
        f"{_shown(before.fingerprint)}, and is {_shown(now)}"
      )

  def unchanged(self, before: Mapping[str, Any]) -> bool:
    """Whether the input is still what it was.

    A file is only read if its times are other ones, or were not kept. No time
    is compared with another: files keep theirs when they are moved or copied.

    Args:
      before: `Input.as_json` of an earlier time.
    """
    stat = self._stat()
    now = {"source": self.spec, "rows": self.rows and list(self.rows)}
    now["bytes"] = stat and stat.size
    if not _has(before, now):
      return False
    if stat is None or _has(before, _times(stat)):
      return True
    try:
      return sha256(self._path) == before.get("sha256")
    except OSError as error:
      if rejects.hits_all(error):
        raise
      return False  # who labels it again says so


def _times(stat: files.Stat) -> dict[str, int]:
  """A file that is moved or copied gets another `changed_ns`, whatever keeps
  its time of modification."""
  return {"modified_ns": stat.modified_ns, "changed_ns": stat.changed_ns}


def _has(before: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
  return all(before.get(key) == value for key, value in values.items())


def sha256(path: files.Path) -> str:
  """The hash of a file's content.

  A process reads it again only if its size or one of its times is another one.
  """
  return _sha256(path, files.stat(path))


@functools.lru_cache(maxsize=100_000)
def _sha256(path: files.Path, stat: files.Stat) -> str:
  del stat  # part of the key
  return files.sha256(path)


def _shown(fingerprint: dict[str, Any]) -> str:
  if "sha256" not in fingerprint:
    return "no file"
  size, digest = fingerprint["bytes"], fingerprint["sha256"]
  return f"{size} bytes with the SHA-256 {digest[:16]}..."


def find(
  specs: Sequence[str], image_root: str, with_texts: bool, work_unit_rows: int
) -> list[WorkUnit]:
  """Returns the work units of all sources, in order.

  Args:
    specs: sources; see docs/data.md.
    image_root: folder that relative image paths in annotations start from.
    with_texts: whether to read web texts.
    work_unit_rows: rows of a work unit, for sources without shards.

  Raises:
    ValueError: there is no source, one cannot be read, work units have no rows,
      or two would have the same name.
  """
  if work_unit_rows < 1:
    raise ValueError(
      f"config.work_unit_rows: expected 1 or more, found {work_unit_rows}"
    )
  work_units = []
  for spec in filter(None, specs):
    shards = specs_lib.shard_specs(spec)
    for shard in shards:
      stem = os.path.splitext(os.path.basename(specs_lib.path_of(shard)))[0]
      name = files.shortened(files.printable(stem))
      work_units.append(WorkUnit(name, shard, image_root, with_texts))
    if not shards:
      images = _ImagesWithTexts(spec, image_root, with_texts)
      images.warn_of_unlisted()
      num_rows = len(images)
      stem = os.path.basename(os.path.normpath(specs_lib.path_of(spec)))
      stem = files.shortened(re.sub(r"[^\w.-]+", "-", stem))
      for start in range(0, num_rows, work_unit_rows):
        name = f"{stem}-{start // work_unit_rows:05d}"
        rows = start, min(start + work_unit_rows, num_rows)
        work_units.append(WorkUnit(name, spec, image_root, with_texts, rows))
  if not work_units:
    raise ValueError(
      "config.source: there is nothing to label; for example "
      "--config.source='shards/*.tar'"
    )
  _refuse_equal_names(work_units)
  return work_units


def _refuse_equal_names(work_units: Sequence[WorkUnit]) -> None:
  counts = collections.Counter(unit.name for unit in work_units)
  name, count = counts.most_common(1)[0]
  if count > 1:
    specs = [unit.spec for unit in work_units if unit.name == name]
    raise ValueError(
      f"config.source: {count} shards are named {name!r}, so that their "
      f"outputs would overwrite each other: {specs[:3]}; rename them, or run "
      "one job per folder and merge the jobs with config.merge.jobs"
    )


def _rows_of(spec: str, image_root: str) -> tuple[str, str]:
  """The spec and image root of what is labelled.

  If a folder has a table, these are the rows of the table, and not the files.
  """
  folder = specs_lib.path_of(spec)
  table = folders.metadata(folder) if files.is_folder(folder) else None
  if table is None:
    return spec, image_root
  return table + spec.removeprefix(folder), folder


class _ImagesWithTexts:
  """All images of a source, each with a list of its texts, maybe empty."""

  def __init__(self, spec: str, image_root: str, with_texts: bool):
    self._folder = specs_lib.path_of(spec)
    spec, image_root = _rows_of(spec, image_root)
    self._table = specs_lib.path_of(spec)
    self._captioned = None
    if with_texts:
      self._captioned = datasets.open_source(spec, image_root)
    if isinstance(self._captioned, folders.CaptionedImages):
      self._images = self._captioned.without_captions()
    else:
      self._images = datasets.open_images(spec, image_root)

  def __len__(self) -> int:
    return len(self._images)

  def warn_of_unlisted(self) -> None:
    """Counts images of a folder that the folder's table does not list."""
    if self._table == self._folder:
      return
    try:
      names = folders.listing(self._folder)
    except ValueError:  # the images are in the table
      return
    listed = {os.path.normpath(path) for path in self._paths()}
    unlisted = [
      name
      for name in names
      if os.path.normpath(os.path.join(self._folder, name)) not in listed
    ]
    if unlisted:
      log.warning(
        "%s: %d of its %d images are not in %s, so they are not labelled, such "
        "as %s",
        files.printable(self._folder),
        len(unlisted),
        len(names),
        os.path.basename(self._table),
        files.printable(unlisted[0]),
      )

  def _paths(self) -> Iterator[str]:
    for row in range(len(self)):
      with contextlib.suppress(sources.BadRow):
        yield sources.image_path(self._images[row])

  @property
  def problems(self) -> list[str]:
    """What is damaged, so that rows are missing."""
    lines = [
      line
      for source in (self._images, self._captioned)
      for line in getattr(source, "problems", [])
    ]
    return list(dict.fromkeys(lines))

  def __getitem__(self, row: int) -> sources.Record:
    if self._captioned is None:
      return self._images[row] | {"caption": []}
    try:
      record = self._captioned[row]
    except sources.BadRow as bad:
      return self._images[row] | {"caption": [], "no_text": bad.reason}
    return record | {"caption": sources.captions(record)}
