"""Tar shards in the format of webdataset and img2dataset."""

import bisect
import concurrent.futures
import functools
import itertools
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from blip_jax.data import offsets, schema, sources, tar_index
from blip_jax.runtime import files


class TarShards:
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
    self._keep = schema.kept_names(keep)
    with concurrent.futures.ThreadPoolExecutor(sources.INDEX_THREADS) as pool:
      build = functools.partial(tar_index.cached, keep=self._keep)
      indexed = list(pool.map(build, self.paths))
    self._shards = [offsets.Mapped(index) for index, _ in indexed]
    numbers = [tar_index.num_samples(index) for index, _ in indexed]
    self._starts = list(itertools.accumulate(numbers, initial=0))
    self.problems = [line for _, damage in indexed for line in damage]
    for line in self.problems:
      logging.warning("Damaged shard: %s", line)
    for path, (index, _) in zip(self.paths, indexed, strict=True):
      if members := tar_index.unused(index):
        _log_unused(path, tuple(members))
    if not len(self):
      raise ValueError(f"No samples in {paths[0]} and {len(paths) - 1} others.")
    self._check_kept()

  def __len__(self) -> int:
    return self._starts[-1]

  def __getitem__(self, index: int) -> sources.Record:
    path, sample, id = self._find(index)
    record = {"image": _member(path, sample["image"], id, "image"), "id": id}
    if self._with_captions:
      record["caption"] = _caption(path, sample, id)
    if self._keep:
      row = self._row(path, sample, id)
      record |= schema.kept_values(self._keep, row, id, f"{path}: {id}")
    return record

  def _find(self, index: int) -> tuple[str, np.void, str]:
    """Returns the shard, the entry of its index and the id of a sample."""
    index = range(len(self))[index]
    shard = bisect.bisect_right(self._starts, index) - 1
    sample = self._shards[shard].array[index - self._starts[shard]]
    path = self.paths[shard]
    label = path.removeprefix(self._folder)
    id = files.printable(f"{label}:{os.fsdecode(bytes(sample['key']))}")
    return path, sample, id

  def _row(self, path: str, sample: np.void, id: str) -> dict[str, Any]:
    """Returns what may be kept of a sample, by name."""
    texts = {}
    for name in self._keep:
      span = sample[tar_index.member_field(name)]
      if span[0] >= 0:
        try:
          texts[name] = _member(path, span, id, name).decode("utf-8")
        except UnicodeDecodeError as error:
          detail = f"{path}: {name}: {error}"
          raise sources.BadRow(id, "broken_row", detail) from error
    if len(texts) == len(self._keep) or sample["json"][0] < 0:
      return texts
    return _json(path, sample, id) | texts

  def _check_kept(self) -> None:
    # Endings are in the index, so only keys of json need a search.
    sought = [name for name in self._keep if not self._has_member(name)]
    if not sought:
      return
    endings = tar_index.endings(self.paths[0])

    def columns(index: int) -> list[str]:
      path, sample, id = self._find(index)
      has_json = sample["json"][0] >= 0
      return [*(_json(path, sample, id) if has_json else ()), *endings]

    schema.search_kept(sought, columns, len(self), self.paths[0])

  def _has_member(self, ending: str) -> bool:
    field = tar_index.member_field(ending)
    return any((s.array[field][:, 0] >= 0).any() for s in self._shards)


@functools.cache  # CapFilt opens a shard several times
def _log_unused(path: str, members: tuple[tuple[str, int], ...]) -> None:
  counts = ", ".join(f"{number} such as {name}" for name, number in members)
  message = f"{path}: members that are not used: {counts}"
  logging.warning("%s", files.one_line(message))


def _caption(
  path: str, sample: np.void, id: str
) -> str | bytes | list[str | bytes]:
  if sample["text"][0] >= 0 or sample["json"][0] < 0:
    return _member(path, sample["text"], id, "caption")
  row = _json(path, sample, id)
  key = next((key for key in schema.CAPTIONS if key in row), None)
  if key is None:
    detail = f"{path}: json: no caption among {list(row)!r:.200}"
    raise sources.BadRow(id, "broken_row", detail)
  return schema.caption(row[key], id, f"{path}: json: {key!r}")


def _json(path: str, sample: np.void, id: str) -> dict[str, Any]:
  raw = _member(path, sample["json"], id, "json")
  try:
    row = json.loads(raw.decode("utf-8"))
  except (ValueError, RecursionError) as error:
    raise sources.BadRow(
      id, "broken_row", f"{path}: json: {error!r}"
    ) from error
  if not isinstance(row, dict):
    detail = f"{path}: json: expected an object, found {row!r:.200}"
    raise sources.BadRow(id, "broken_row", detail)
  return row


def _member(path: str, span: np.ndarray, id: str, part: str) -> bytes:
  offset, size = (int(n) for n in span)
  if offset < 0:
    raise sources.BadRow(
      id, f"missing_{part}", f"{path}: the sample has no {part}"
    )
  try:
    raw = files.read_range(path, offset, size)
  except OSError as error:
    detail = f"{path}: {part}: {error}"
    raise sources.BadRow(id, "unreadable", detail) from error
  if len(raw) < size:
    raise sources.BadRow(
      id, "broken_row", f"{path}: the shard is shorter than it was"
    )
  return raw
