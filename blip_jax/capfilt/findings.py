"""Statistics of a job's texts, and which of its images a report shows."""

import collections
import heapq
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from blip_jax.capfilt import label, rules

NUM_BINS = 20
GALLERY_SIZE, NUM_FREQUENT, NUM_BAD_EXAMPLES = 12, 20, 5
# Different texts that are counted; beyond it, the rarest half is forgotten.
_MAX_COUNTED_TEXTS = 2_000_000
_SOURCES = (label.WEB, label.SYNTHETIC)
_STAGES = ("before", "after")

Row = dict[str, Any]


class GalleryItem(NamedTuple):
  """An image of a gallery.

  Attributes:
    work_unit: its number, as given to `Findings.add`.
    rows: all rows of the image.
    index: of the row that it is shown for.
  """

  work_unit: int
  rows: list[Row]
  index: int


class Findings:
  """Statistics over the rows of work units, and images worth a look.

  Args:
    threshold: of `itm_prob`; galleries show texts near it and far from it.
  """

  def __init__(self, threshold: float):
    self._threshold = threshold
    self._texts = {source: collections.Counter() for source in _SOURCES}
    self._images = collections.Counter()
    self._histogram = {source: np.zeros(NUM_BINS, int) for source in _SOURCES}
    self._texts_per_image = collections.Counter()
    self._lengths = {stage: collections.Counter() for stage in _STAGES}
    self._words = {stage: collections.Counter() for stage in _STAGES}
    self._frequent = collections.Counter()
    self._bad_examples: dict[str, list[str]] = collections.defaultdict(list)
    self._num_bad = collections.Counter()
    self._damage: list[str] = []
    # (source, is kept, "near" or "far") -> a heap of the best.
    self._galleries: dict[tuple[str, bool, str], list] = (
      collections.defaultdict(list)
    )
    self._num_considered = 0

  def add(
    self,
    work_unit: int,
    rows: Sequence[Row],
    reasons: Sequence[str],
    done: Mapping[str, Any],
  ) -> None:
    """Counts a work unit.

    Args:
      work_unit: its number.
      rows: all its rows.
      reasons: why each row is dropped; "" if it is kept.
      done: content of its done-file.
    """
    self._damage += done["damage"]
    self._images.update({key: done["images"][key] for key in ("in", "bad")})
    for key, why in done["bad"].items():
      self._add_bad(why.partition(":")[0], key)
    indices_by_key: dict[str, list[int]] = collections.defaultdict(list)
    for index, row in enumerate(rows):
      indices_by_key[row["key"]].append(index)
    for indices in indices_by_key.values():
      image_rows = [rows[index] for index in indices]
      image_reasons = [reasons[index] for index in indices]
      self._add_image(work_unit, image_rows, image_reasons)
    without_texts = (
      done["images"]["in"] - done["images"]["bad"] - len(indices_by_key)
    )
    self._texts_per_image[0] += without_texts

  def _add_image(
    self, work_unit: int, rows: list[Row], reasons: Sequence[str]
  ) -> None:
    for index, (row, reason) in enumerate(zip(rows, reasons, strict=True)):
      source, prob = row["source"], row["itm_prob"]
      self._texts[source].update(["in", reason or "kept"])
      if prob is None:
        self._add_bad(row["reason"], row["key"])
        continue
      self._histogram[source][min(int(prob * NUM_BINS), NUM_BINS - 1)] += 1
      words = rules.words_of(row["text"])
      if source == label.WEB:
        self._add_words("before", words)
      if not reason:
        self._add_words("after", words)
        self._frequent[" ".join(words)] += 1
      self._add_to_galleries(GalleryItem(work_unit, rows, index), not reason)
    if len(self._frequent) > _MAX_COUNTED_TEXTS:
      most_common = self._frequent.most_common(_MAX_COUNTED_TEXTS // 2)
      self._frequent = collections.Counter(dict(most_common))
    self._texts_per_image[sum(not reason for reason in reasons)] += 1

  def _add_words(self, stage: str, words: Sequence[str]) -> None:
    self._lengths[stage][len(words)] += 1
    self._words[stage].update(words)

  def _add_bad(self, reason: str, key: str) -> None:
    self._num_bad[reason] += 1
    if len(self._bad_examples[reason]) < NUM_BAD_EXAMPLES:
      self._bad_examples[reason].append(key)

  def _add_to_galleries(self, item: GalleryItem, is_kept: bool) -> None:
    """Adds a text if it is among the nearest to the threshold, or the farthest
    from it, of its source and outcome."""
    row = item.rows[item.index]
    distance = abs(row["itm_prob"] - self._threshold)
    # Distances are rounded, and a hash decides between equal ones, so that the
    # order of the rows does not.
    tie_breaker = zlib.crc32(f"{row['key']} {item.index}".encode()) / 2**32
    for name, score in (("near", -distance), ("far", round(distance, 2))):
      heap = self._galleries[row["source"], is_kept, name]
      # A unique number, so that no two items are compared.
      self._num_considered += 1
      entry = (score, tie_breaker, self._num_considered, item)
      if len(heap) < GALLERY_SIZE:
        heapq.heappush(heap, entry)
      else:
        heapq.heappushpop(heap, entry)

  def galleries(self) -> dict[str, list[GalleryItem]]:
    """Title -> images, the best examples first."""
    titles = {
      (True, "far"): "kept, far above the threshold",
      (True, "near"): "kept, near the threshold",
      (False, "near"): "dropped, near the threshold",
      (False, "far"): "dropped, far from the threshold",
    }
    return {
      f"{source.capitalize()} texts {title}": [
        entry[-1] for entry in sorted(heap, reverse=True)
      ]
      for source in _SOURCES
      for (is_kept, name), title in titles.items()
      if (heap := self._galleries.get((source, is_kept, name)))
    }

  def as_json(self) -> dict[str, Any]:
    """Returns the statistics as `report.json` has them."""
    num_usable = self._images["in"] - self._images["bad"]
    return {
      "images": {
        "in": self._images["in"],
        "kept": num_usable - self._texts_per_image[0],
        "dropped": self._texts_per_image[0],
        "bad": self._images["bad"],
      },
      "texts": {source: dict(counts) for source, counts in self._texts.items()},
      "histogram": {
        source: bins.tolist() for source, bins in self._histogram.items()
      },
      "texts_per_image": _sorted(self._texts_per_image),
      "words": {
        stage: {
          "texts": self._lengths[stage].total(),
          "mean_length": round(_mean(self._lengths[stage]), 2),
          "vocabulary": len(self._words[stage]),
          "lengths": _sorted(self._lengths[stage]),
        }
        for stage in _STAGES
      },
      "frequent": self._frequent.most_common(NUM_FREQUENT),
      "bad": {
        reason: {"number": number, "examples": self._bad_examples[reason]}
        for reason, number in self._num_bad.most_common()
      },
      "damage": self._damage,
    }


def _mean(counts: collections.Counter[int]) -> float:
  total = sum(value * count for value, count in counts.items())
  return total / max(counts.total(), 1)


def _sorted(counts: Mapping[int, int]) -> dict[int, int]:
  return dict(sorted(counts.items()))
