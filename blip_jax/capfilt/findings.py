"""What is counted of a job's texts, and which are worth a look."""

import collections
import heapq
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from blip_jax.capfilt import label, rules

BINS = 20
# Of a gallery; of what is frequent; of what is bad.
PICTURES, FREQUENT, EXAMPLES = 12, 20, 5
# Different texts that are counted before the rare ones are forgotten.
_MANY_TEXTS = 2_000_000
_SOURCES = (label.WEB, label.SYNTHETIC)
_WHEN = ("before", "after")


class Shown(NamedTuple):
  """A picture of a gallery: in which unit, and all rows of it."""

  unit: int
  rows: list[dict[str, Any]]
  text: int  # the row that it is shown for


class Findings:
  """Counts over the rows of units, and pictures that are worth a look."""

  def __init__(self, threshold: float):
    self._threshold = threshold
    self._texts = {source: collections.Counter() for source in _SOURCES}
    self._pictures = collections.Counter()
    self._histogram = {source: np.zeros(BINS, int) for source in _SOURCES}
    self._per_picture = collections.Counter()
    self._lengths = {when: collections.Counter() for when in _WHEN}
    self._words = {when: collections.Counter() for when in _WHEN}
    self._frequent = collections.Counter()
    self._bad: dict[str, list[str]] = collections.defaultdict(list)
    self._num_bad = collections.Counter()
    self._damage: list[str] = []
    self._best: dict[str, list] = collections.defaultdict(list)
    self._ties = 0

  def add(
    self,
    unit: int,
    found: list[dict[str, Any]],
    reasons: list[str],
    told: dict[str, Any],
  ) -> None:
    """Takes note of a unit.

    Args:
      unit: its number.
      found: its rows.
      reasons: why each is left out; "" if it is not.
      told: what its done-file says.
    """
    self._damage += told["damage"]
    self._pictures.update({k: told["pictures"][k] for k in ("in", "bad")})
    for key, why in told["bad"].items():
      self._note_bad(why.partition(":")[0], key)
    places = collections.defaultdict(list)
    for place, row in enumerate(found):
      places[row["key"]].append(place)
    for own in places.values():
      self._add_picture(unit, [(found[p], reasons[p]) for p in own])
    without_texts = (
      told["pictures"]["in"] - told["pictures"]["bad"] - len(places)
    )
    self._per_picture[0] += without_texts

  def _add_picture(
    self, unit: int, own: list[tuple[dict[str, Any], str]]
  ) -> None:
    for place, (row, reason) in enumerate(own):
      source, prob = row["source"], row["itm_prob"]
      self._texts[source].update(["in", reason or "kept"])
      if prob is None:
        self._note_bad(row["reason"], row["key"])
        continue
      self._histogram[source][min(int(prob * BINS), BINS - 1)] += 1
      words = rules.words_of(row["text"])
      if source == label.WEB:
        self._count("before", words)
      if not reason:
        self._count("after", words)
        self._frequent[" ".join(words)] += 1
      self._consider(unit, [r for r, _ in own], place, not reason)
    if len(self._frequent) > _MANY_TEXTS:
      often = self._frequent.most_common(_MANY_TEXTS // 2)
      self._frequent = collections.Counter(dict(often))
    self._per_picture[sum(not reason for _, reason in own)] += 1

  def _count(self, when: str, words: Sequence[str]) -> None:
    self._lengths[when][len(words)] += 1
    self._words[when].update(words)

  def _note_bad(self, why: str, key: str) -> None:
    self._num_bad[why] += 1
    if len(self._bad[why]) < EXAMPLES:
      self._bad[why].append(key)

  def _consider(
    self, unit: int, own: list[dict[str, Any]], place: int, kept: bool
  ) -> None:
    """Keeps a text for the galleries, if it is among the nearest to the
    threshold, or among the farthest from it, of its kind."""
    row = own[place]
    distance = abs(row["itm_prob"] - self._threshold)
    # In steps, so that chance and not the order decides between equals.
    chance = zlib.crc32(f"{row['key']} {place}".encode()) / 2**32
    for name, score in (("near", -distance), ("far", round(distance, 2))):
      kind = row["source"], kept, name
      self._ties += 1
      entry = (score, chance, self._ties, Shown(unit, own, place))
      if len(self._best[kind]) < PICTURES:
        heapq.heappush(self._best[kind], entry)
      else:
        heapq.heappushpop(self._best[kind], entry)

  def galleries(self) -> dict[str, list[Shown]]:
    """Title -> pictures, the best examples first."""
    titles = {
      (True, "far"): "kept, far above the threshold",
      (True, "near"): "kept, near the threshold",
      (False, "near"): "left out, near the threshold",
      (False, "far"): "left out, far from the threshold",
    }
    return {
      f"{source} texts {title}": [
        entry[-1] for entry in sorted(self._best[source, *kind], reverse=True)
      ]
      for source in _SOURCES
      for kind, title in titles.items()
      if self._best[source, *kind]
    }

  def as_json(self) -> dict[str, Any]:
    mean = lambda of: sum(n * k for n, k in of.items()) / max(of.total(), 1)
    usable = self._pictures["in"] - self._pictures["bad"]
    return {
      "pictures": {
        "in": self._pictures["in"],
        "kept": usable - self._per_picture[0],
        "dropped": self._per_picture[0],
        "bad": self._pictures["bad"],
      },
      "texts": {source: dict(of) for source, of in self._texts.items()},
      "histogram": {s: of.tolist() for s, of in self._histogram.items()},
      "texts_per_picture": _sorted(self._per_picture),
      "words": {
        when: {
          "texts": self._lengths[when].total(),
          "mean_length": round(mean(self._lengths[when]), 2),
          "vocabulary": len(self._words[when]),
          "lengths": _sorted(self._lengths[when]),
        }
        for when in _WHEN
      },
      "frequent": self._frequent.most_common(FREQUENT),
      "bad": {
        why: {"number": number, "examples": self._bad[why]}
        for why, number in self._num_bad.most_common()
      },
      "damage": self._damage,
    }


def _sorted(counter: Mapping[int, int]) -> dict[int, int]:
  return dict(sorted(counter.items()))
