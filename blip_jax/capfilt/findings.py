"""Statistics of a job's texts, and which of its images a report shows."""

import collections
import heapq
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from blip_jax.capfilt import label, rules

# Bars of a histogram, which has one more if the threshold is within a bar.
NUM_BINS = 20
# Probabilities are shown by their logits, in steps that are fine enough for
# bars of any width: those of a filter may all be close to 1, or to 0.5.
_LOGIT_STEP = 1e-4
_SMALLEST = 2.0**-25  # float32 has no probabilities between 1 - 2 ** -25 and 1
GALLERY_SIZE, NUM_FREQUENT, NUM_BAD_EXAMPLES = 12, 20, 5
_NUM_CANDIDATES = 4 * GALLERY_SIZE  # some are shown elsewhere
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
    self._threshold = logit(threshold)
    self._texts = {source: collections.Counter() for source in _SOURCES}
    self._images = collections.Counter()
    # Logits in steps from the threshold.
    self._steps = {source: collections.Counter() for source in _SOURCES}
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
    by_outcome = collections.defaultdict(list)
    for index, (row, reason) in enumerate(zip(rows, reasons, strict=True)):
      source, prob = row["source"], row["itm_prob"]
      self._texts[source].update(["in", reason or "kept"])
      if bad := rules.why_bad(row):
        self._add_bad(bad, row["key"])
        continue
      margin = logit(prob) - self._threshold
      self._steps[source][math.floor(margin / _LOGIT_STEP)] += 1
      by_outcome[source, not reason].append((abs(margin), index))
      words = rules.words_of(row["text"])
      if source == label.WEB:
        self._add_words("before", words)
      if not reason:
        self._add_words("after", words)
        self._frequent[" ".join(words)] += 1
    for outcome, texts in by_outcome.items():
      for name, (distance, index) in (
        ("near", min(texts)),
        ("far", max(texts)),
      ):
        item = GalleryItem(work_unit, rows, index)
        self._add_to_gallery((*outcome, name), item, distance)
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

  def _add_to_gallery(
    self, gallery: tuple[str, bool, str], item: GalleryItem, distance: float
  ) -> None:
    """Adds an image if its text is among the nearest to the threshold, or the
    farthest from it, of its source and outcome."""
    # Distances are rounded, and a hash decides between equal ones, so that the
    # order of the rows does not.
    score = -distance if gallery[-1] == "near" else round(distance, 2)
    key = f"{item.rows[item.index]['key']} {item.index}"
    tie_breaker = zlib.crc32(key.encode()) / 2**32
    heap = self._galleries[gallery]
    # A unique number, so that no two items are compared.
    self._num_considered += 1
    entry = (score, tie_breaker, self._num_considered, item)
    if len(heap) < _NUM_CANDIDATES:
      heapq.heappush(heap, entry)
    else:
      heapq.heappushpop(heap, entry)

  def galleries(self) -> dict[str, list[GalleryItem]]:
    """Title -> images, the best examples first.

    No gallery has an image twice, and no image is in one of texts near the
    threshold and in another of texts far from it: galleries take their best
    images in turn.
    """
    ranked = {
      gallery: iter([entry[-1] for entry in sorted(heap, reverse=True)])
      for gallery, heap in sorted(self._galleries.items(), reverse=True)
    }
    found = {gallery: [] for gallery in ranked}
    side_of_image: dict[tuple[int, str], str] = {}
    for _ in range(GALLERY_SIZE):
      for gallery, items in ranked.items():
        side = gallery[-1]
        for item in items:
          if side_of_image.setdefault(_image(item), side) == side:
            found[gallery].append(item)
            break
    titles = {
      (True, "far"): "kept, far above the threshold",
      (True, "near"): "kept, near the threshold",
      (False, "near"): "dropped, near the threshold",
      (False, "far"): "dropped, far from the threshold",
    }
    return {
      f"{source.capitalize()} texts {title}": items
      for source in _SOURCES
      for (is_kept, name), title in titles.items()
      if (items := found.get((source, is_kept, name)))
    }

  def _histogram(self, steps: Mapping[int, int]) -> dict[str, list]:
    """Bins of probabilities: their edges, and the texts in [edge, next edge).

    They have the same width in logits, and one starts at the threshold, so that
    no bin has texts below it and above. The first bin and the last have what is
    outside of 98 % of all texts, so that single texts do not widen the others.
    """
    if not steps:
      return {"edges": [], "counts": []}
    values = np.array(sorted(steps))
    counts = np.array([steps[value] for value in values])
    cumulative = counts.cumsum() / counts.sum()
    low, high = values[np.searchsorted(cumulative, (0.01, 0.99))]
    width = -(-(high + 1 - low) // NUM_BINS)
    first, last = low // width, high // width
    bins = np.bincount(
      np.clip(values // width, first, last) - first, counts
    ).astype(int)
    edges = np.arange(first, last + 2) * width
    edges[0] = min(edges[0], values[0])
    edges[-1] = max(edges[-1], values[-1] + 1)
    logits = self._threshold + _LOGIT_STEP * edges
    return {
      "edges": (1 / (1 + np.exp(-logits))).tolist(),
      "counts": bins.tolist(),
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
        source: self._histogram(steps) for source, steps in self._steps.items()
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


def logit(prob: float) -> float:
  """The logit of a probability, which is finite for 0 and 1 too."""
  prob = min(max(prob, _SMALLEST), 1 - _SMALLEST)
  return math.log(prob / (1 - prob))


def _image(item: GalleryItem) -> tuple[int, str]:
  return item.work_unit, item.rows[item.index]["key"]


def _mean(counts: collections.Counter[int]) -> float:
  total = sum(value * count for value, count in counts.items())
  return total / max(counts.total(), 1)


def _sorted(counts: Mapping[int, int]) -> dict[int, int]:
  return dict(sorted(counts.items()))
