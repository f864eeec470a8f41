"""The units of a job: pieces of a collection, finished one at a time.

A tar shard or a Parquet file is a unit. What has no files of its own for its
pictures (annotations, folders, TFDS) is cut every so many rows.
"""

import collections
import dataclasses
import hashlib
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from blip_jax.data import datasets, folders, sources


@dataclasses.dataclass(frozen=True)
class WorkUnit:
  """A piece of a collection.

  Attributes:
    name: of its files in the job's folder; a function of the input alone.
    spec: of the source that it is part of.
    image_root: what relative paths in it start from.
    with_texts: whether to look for texts.
    rows: of the source, [start, end); None: all.
  """

  name: str
  spec: str
  image_root: str = ""
  with_texts: bool = True
  rows: tuple[int, int] | None = None

  def open(self) -> tuple[sources.Rows, list[str]]:
    """Its records, and what is damaged in it.

    Records are as `datasets.open_source` gives them, with a list of texts under
    `caption`; where there should be one and is none, `no_text` says why.
    """
    nothing = sources.Rows((), np.arange(0))
    try:
      source = _Texts(self.spec, self.image_root, self.with_texts)
    except ValueError as error:
      # Annotations were open when their units were found.
      return nothing, [str(error)]
    rows = np.arange(*(self.rows or (0, len(source))))
    return sources.Rows(source, rows), source.problems

  def fingerprint(self) -> dict[str, Any]:
    """What tells the input from another: of a file, its content; the pictures
    that annotations point to are not looked at."""
    found = {"source": self.spec, "rows": self.rows and list(self.rows)}
    path = datasets.path_of(self.spec)
    if os.path.isfile(path):
      with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
      return found | {"bytes": os.path.getsize(path), "sha256": sha256}
    return found

  def unchanged(self, fingerprint: dict[str, Any], since: float) -> bool:
    """Whether that is still the fingerprint.

    Args:
      since: when it was taken, in seconds since the epoch; what is older is not
        read again.
    """
    path = datasets.path_of(self.spec)
    size = os.path.getsize(path) if os.path.isfile(path) else None
    rows = self.rows and list(self.rows)
    if (fingerprint["rows"], fingerprint.get("bytes")) != (rows, size):
      return False
    return (
      size is None
      or os.path.getmtime(path) < since
      or fingerprint == self.fingerprint()
    )


def find(
  specs: Sequence[str], image_root: str, with_texts: bool, work_unit_rows: int
) -> list[WorkUnit]:
  """The units of all sources, in order.

  Args:
    specs: sources; see README, "Data".
    image_root: what relative paths of pictures in annotations start from.
    with_texts: whether to look for texts.
    work_unit_rows: where to cut what is not made of shards.

  Raises:
    ValueError: a source cannot be read, or two units would have the same name.
  """
  units = []
  for spec in filter(None, specs):
    shards = datasets.shard_specs(spec)
    for shard in shards:
      name = os.path.splitext(os.path.basename(datasets.path_of(shard)))[0]
      units.append(WorkUnit(name, shard, image_root, with_texts))
    if not shards:
      number = len(_Texts(spec, image_root, with_texts))
      stem = os.path.basename(os.path.normpath(datasets.path_of(spec)))
      stem = re.sub(r"[^\w.-]+", "-", stem)
      for start in range(0, number, work_unit_rows):
        name = f"{stem}-{start // work_unit_rows:05d}"
        rows = start, min(start + work_unit_rows, number)
        units.append(WorkUnit(name, spec, image_root, with_texts, rows))
  if not units:
    raise ValueError(
      "config.source: nothing to clean; for example "
      "--config.source='shards/*.tar'"
    )
  names = collections.Counter(unit.name for unit in units)
  name, number = names.most_common(1)[0]
  if number > 1:
    same = [unit.spec for unit in units if unit.name == name]
    raise ValueError(
      f"config.source: {number} shards have the name {name!r}, so that their "
      f"pictures could not be told apart: {same[:3]}; rename them, or give "
      "each folder a job of its own and merge both with config.merge.jobs"
    )
  return units


class _Texts:
  """All pictures of a source with their texts, of which there may be none."""

  def __init__(self, spec: str, image_root: str, with_texts: bool):
    self._described = None
    if with_texts:
      self._described = datasets.open_source(spec, image_root)
    if isinstance(self._described, folders.CaptionedImages):
      self._pictures = self._described.without_captions()
    else:
      self._pictures = datasets.open_images(spec, image_root)

  def __len__(self) -> int:
    return len(self._pictures)

  @property
  def problems(self) -> list[str]:
    """What is damaged, so that rows are missing."""
    return getattr(self._pictures, "problems", [])

  def __getitem__(self, row: int) -> sources.Record:
    if self._described is None:
      return self._pictures[row] | {"caption": []}
    try:
      record = self._described[row]
    except sources.BadRow as bad:
      return self._pictures[row] | {"caption": [], "no_text": bad.reason}
    return record | {"caption": sources.captions(record)}
