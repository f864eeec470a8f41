"""Tar shards, as webdataset and img2dataset write them."""

import bisect
import concurrent.futures
import itertools
import json
import os
from collections.abc import Sequence

import numpy as np
from absl import logging

from blip_jax.data import offsets, sources


class TarShards:
  """Samples of webdataset or img2dataset tar files, read where they lie.

  A sample is made of the members that share a name up to its first dot: a
  picture (jpg, jpeg, png, webp) and its caption (txt, or the key "caption" of
  json). Nothing is extracted, and members of other kinds are never opened.
  Without captions a picture is all that a sample needs.

  `problems` lists what is damaged in which shard; the samples around it stay.
  """

  def __init__(self, paths: Sequence[str], with_captions: bool = True):
    self.paths = sources.existing(paths, "shards")
    self._folder = sources.shared_folder(paths)
    self._with_captions = with_captions
    with concurrent.futures.ThreadPoolExecutor(sources.INDEX_THREADS) as pool:
      found = list(pool.map(_tar_index, self.paths))
    self._shards = [offsets.Mapped(index) for index, _ in found]
    self._ends = list(itertools.accumulate(len(index) for index, _ in found))
    self.problems = [line for _, damage in found for line in damage]
    for line in self.problems:
      logging.warning("Damaged shard: %s", line)
    if not len(self):
      raise ValueError(f"No samples in {paths[0]} and {len(paths) - 1} others.")

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: int) -> sources.Record:
    index = range(len(self))[index]
    shard = bisect.bisect_right(self._ends, index)
    rows = self._shards[shard].array
    sample = rows[index - self._ends[shard]]  # counted from the shard's end
    path = self.paths[shard]
    label = path.removeprefix(self._folder)
    id = f"{label}:{os.fsdecode(bytes(sample['key']))}"
    record = {"image": _member(path, sample["image"], id, "image"), "id": id}
    if self._with_captions:
      record["caption"] = _tar_caption(path, sample, id)
    return record


def _tar_index(path: str) -> tuple[np.ndarray, list[str]]:
  return offsets.cached(path, "samples", offsets.tar_samples)


def _tar_caption(path: str, sample: np.void, id: str) -> str | bytes:
  if sample["text"][0] >= 0 or sample["json"][0] < 0:
    return _member(path, sample["text"], id, "caption")
  raw = _member(path, sample["json"], id, "caption")
  try:
    caption = json.loads(raw.decode("utf-8"))["caption"]
  except (ValueError, RecursionError, KeyError, TypeError) as error:
    raise sources.BadRow(
      id, "broken_row", f"{path}: json: {error!r}"
    ) from error
  if not isinstance(caption, str):
    raise sources.BadRow(id, "empty_caption", f"{path}: json: {caption!r:.200}")
  return caption


def _member(path: str, span: np.ndarray, id: str, part: str) -> bytes:
  offset, size = (int(n) for n in span)
  if offset < 0:
    raise sources.BadRow(
      id, f"missing_{part}", f"{path}: the sample has no {part}"
    )
  raw = offsets.read_span(path, offset, size)
  if len(raw) < size:
    raise sources.BadRow(
      id, "broken_row", f"{path}: the shard is shorter than it was"
    )
  return raw
