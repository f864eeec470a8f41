"""Tar shards in the format of webdataset and img2dataset."""

import bisect
import concurrent.futures
import functools
import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import logging

from blip_jax.data import (
  cells,
  image_limits,
  kept_columns,
  rejects,
  schema,
  sources,
  tar_headers,
  tar_index,
)
from blip_jax.runtime import files

_MAX_ENDINGS = 20  # listed in a message


class TarShards(sources.Source):
  """Samples of webdataset or img2dataset tar files, read in place.

  A sample consists of the members that share a name up to its first dot (see
  `tar_index` for further dots): an image (jpg, jpeg, png, webp, or any other of
  `transforms.ENDINGS`) and its caption (txt, or else caption, or else the key
  of json that is named as in annotations), text or a list of texts. Nothing is
  extracted, and members of other kinds are never read, but counted in the log.
  Without captions an image is all that a sample needs.

  `problems` lists the damage of each shard; samples that are intact stay.

  Args:
    keep: further values; the record gets each under its own name: the text of
      the member with that ending (its bytes must be UTF-8), or else the
      value of that key in the sample's json.

  Raises:
    ValueError: on opening, if a shard is missing, there are no samples, or
      no sample has one of the values to keep.
  """

  def __init__(
    self,
    paths: Sequence[str],
    with_captions: bool = True,
    *,
    keep: tuple[str, ...] = (),
  ):
    self.paths = sources.existing(paths, "shards")
    self._folder = sources.shared_folder(paths)
    self._with_captions = with_captions
    self._keep = kept_columns.names(keep)
    with concurrent.futures.ThreadPoolExecutor(sources.INDEX_THREADS) as pool:
      index = functools.partial(_indexed, keep=self._keep)
      indexed = list(pool.map(index, self.paths))
    self._shards = [index for index, _ in indexed]
    numbers = map(len, self._shards)
    self._starts = list(itertools.accumulate(numbers, initial=0))
    self.problems = [line for _, damage in indexed for line in damage]
    for line in self.problems:
      logging.warning("Damaged shard: %s", files.one_line(line))
    for path, (index, _) in zip(self.paths, indexed, strict=True):
      if members := index.unused():
        _log_unused(path, tuple(members))
    if not len(self):
      raise ValueError(
        f"No samples in {paths[0]} and {len(paths) - 1} others. "
        + self.problems[0]
      )
    self._check_kept()

  def __len__(self) -> int:
    return self._starts[-1]

  def _id(self, index: int) -> str:
    sample = self._sample(index)
    label = sample.path.removeprefix(self._folder)
    return files.printable(f"{label}:{sample.key}")

  def _record(self, index: int, id: str) -> sources.Record:
    sample = self._sample(index)
    record = {"image": sample.member("image", id), "id": id}
    if self._with_captions:
      record["caption"] = _caption(sample, id)
    if self._keep:
      row = self._row(sample, id)
      record |= kept_columns.values(self._keep, row, id, f"{sample.path}: {id}")
    return record

  def _sample(self, index: int) -> "_Sample":
    shard = bisect.bisect_right(self._starts, index) - 1
    row = index - self._starts[shard]
    return _Sample(self.paths[shard], self._shards[shard], row)

  def _row(self, sample: "_Sample", id: str) -> dict[str, Any]:
    """Returns what may be kept of a sample, by name."""
    texts = {}
    for name in self._keep:
      field = tar_index.member_field(name)
      if sample.has(field):
        try:
          texts[name] = sample.member(field, id).decode("utf-8")
        except UnicodeDecodeError as error:
          detail = f"{sample.path}: {name}: {error}"
          raise sources.BadRow(id, "broken_row", detail) from error
    if len(texts) == len(self._keep) or not sample.has("json"):
      return texts
    return _json(sample, id) | texts

  def _check_kept(self) -> None:
    # Endings are in the index, so only keys of json need a search.
    sought = [name for name in self._keep if not self._has_member(name)]
    if not sought:
      return
    endings = tar_index.endings(self.paths[0])

    def columns(index: int) -> list[str]:
      sample = self._sample(index)
      row = _json(sample, self._id(index)) if sample.has("json") else ()
      return [*row, *endings]

    check = functools.partial(kept_columns.check, sought)
    schema.search(check, columns, len(self), self.paths[0])

  def _has_member(self, ending: str) -> bool:
    field = tar_index.member_field(ending)
    return any(shard.has(field) for shard in self._shards)


class _Sample(NamedTuple):
  """A sample of a shard, of which nothing is read yet."""

  path: str
  index: tar_index.Index
  row: int

  @property
  def key(self) -> str:
    return self.index.key(self.row)

  def has(self, field: str) -> bool:
    return self.index.span(self.row, field)[0] >= 0

  def member(self, field: str, id: str) -> bytes:
    """Reads a member; raises `BadRow` if it cannot be read."""
    offset, size = self.index.span(self.row, field)
    if offset < 0:
      detail = f"{self.path}: the sample has no {field}"
      reason = "missing_caption" if field == "text" else f"missing_{field}"
      raise sources.BadRow(id, reason, detail)
    if field == "image" and size > image_limits.MAX_BYTES:
      detail = (
        f"{self.path}: {size} bytes; at most {image_limits.MAX_BYTES} are "
        "allowed"
      )
      raise sources.BadRow(id, "too_large", detail)
    read = files.read_range if field == "image" else sources.read_row
    try:
      raw = read(self.path, offset, size)
    except OSError as error:
      if rejects.hits_all(error):
        raise
      detail = f"{self.path}: {field}: {error}"
      raise sources.BadRow(id, "unreadable", detail) from error
    if len(raw) < size:
      detail = f"{self.path}: the shard is shorter than it was"
      raise sources.BadRow(id, "broken_row", detail)
    return raw


@functools.cache  # CapFilt opens a shard several times
def _log_unused(path: str, members: tuple[tuple[str, int], ...]) -> None:
  counts = ", ".join(
    f"{number} such as {tar_headers.shown(name)}"
    for name, number in members[:_MAX_ENDINGS]
  )
  if len(members) > _MAX_ENDINGS:
    counts += f", and {len(members) - _MAX_ENDINGS} further endings"
  message = f"{path}: members that are not used: {counts}"
  logging.warning("%s", files.one_line(message))


def _indexed(
  path: str, keep: tuple[str, ...]
) -> tuple[tar_index.Index, list[str]]:
  """The index of a shard; that of none if it cannot be read at all."""
  try:
    return tar_index.cached(path, keep)
  except Exception as error:
    if rejects.hits_all(error):
      raise
    damage = f"{path}: {type(error).__name__}: {error}"
    return tar_index.no_samples(keep), [damage]


def _caption(sample: _Sample, id: str) -> str | bytes | list[str | bytes]:
  if sample.has("text") or not sample.has("json"):
    return sample.member("text", id)
  row = _json(sample, id)
  where = f"{sample.path}: json"
  key = next((key for key in schema.CAPTIONS if key in row), None)
  if key is None:
    detail = f"{where}: no caption among {list(row)!r:.200}"
    raise sources.BadRow(id, "broken_row", detail)
  return cells.caption(row[key], id, f"{where}: {key!r}")


def _json(sample: _Sample, id: str) -> dict[str, Any]:
  where = f"{sample.path}: json"
  try:
    row = json.loads(sample.member("json", id).decode("utf-8"))
  except (ValueError, RecursionError) as error:
    raise sources.BadRow(id, "broken_row", f"{where}: {error!r}") from error
  if not isinstance(row, dict):
    detail = f"{where}: expected an object, found {row!r:.200}"
    raise sources.BadRow(id, "broken_row", detail)
  return row
