"""Which texts of a picture go into the new training set."""

import collections
import dataclasses
import itertools
import re
import zlib
from collections.abc import Sequence
from typing import Any

from blip_jax.data import transforms

# As a web page has them; a text with a few angle brackets is none.
_MARKUP = re.compile(r"<[a-zA-Z/!][^<>]*>|&[a-zA-Z]{2,8};|https?://|\{\{|\[\[")
_MANY_WORDS = 10_000


@dataclasses.dataclass(frozen=True)
class Rules:
  """What a text must be to be kept; `reasons` says why the others are not.

  Attributes:
    threshold: of `itm_prob`; 0 keeps what the filter would not.
    sources: that may be kept.
    min_words: of a text.
    max_words: of a text; 0: any number.
    max_repeats: how often one word may follow itself, or a pair of words come;
      0: any number.
    markup: whether tags, entities and addresses may be in a text.
    near_duplicates: share of pairs of words, of which two texts of a picture
      may not have more in common; 1: they may not be equal; 0: they may.
    max_per_image: texts of a picture; 0: any number. The likeliest by
      `itm_prob` are kept.
  """

  threshold: float = 0.5
  sources: tuple[str, ...] = ("web", "synthetic")
  min_words: int = 1
  max_words: int = 0
  max_repeats: int = 0
  markup: bool = True
  near_duplicates: float = 1.0
  max_per_image: int = 0

  def __post_init__(self):
    for name, low, high in (
      ("threshold", 0.0, 1.0),
      ("near_duplicates", 0.0, 1.0),
      ("min_words", 0, _MANY_WORDS),
      ("max_words", 0, _MANY_WORDS),
      ("max_repeats", 0, _MANY_WORDS),
      ("max_per_image", 0, _MANY_WORDS),
    ):
      value = getattr(self, name)
      if not low <= value <= high:
        raise ValueError(
          f"config.merge.{name}: expected {low} to {high}, found {value}"
        )
    unknown = set(self.sources) - {"web", "synthetic"}
    if unknown or not self.sources:
      raise ValueError(
        "config.merge.sources: expected some of ('web', 'synthetic'), found "
        f"{self.sources}"
      )

  def reasons(self, texts: Sequence[dict[str, Any]]) -> list[str]:
    """Why each text of one picture is left out; "" for those that are kept.

    Args:
      texts: rows of `capfilt.rows`.
    """
    reasons = [self._of_one(text) for text in texts]
    best_first = sorted(
      (place for place, reason in enumerate(reasons) if not reason),
      # Of equal ones the first, which is from the web.
      key=lambda place: (-texts[place]["itm_prob"], place),
    )
    kept = []
    for place in best_first:
      words = words_of(texts[place]["text"])
      if any(self._is_near(words, other) for other in kept):
        reasons[place] = "near_duplicate"
      elif self.max_per_image and len(kept) >= self.max_per_image:
        reasons[place] = "too_many"
      else:
        kept.append(words)
    return reasons

  def _of_one(self, text: dict[str, Any]) -> str:
    if text["itm_prob"] is None:
      return text["reason"]
    if text["source"] not in self.sources:
      return "other_source"
    if text["itm_prob"] < self.threshold:
      return "below_threshold"
    if not self.markup and _MARKUP.search(text["text"]):
      return "markup"
    words = words_of(text["text"])
    if len(words) < self.min_words:
      return "too_short"
    if self.max_words and len(words) > self.max_words:
      return "too_long"
    if self.max_repeats and _repeats(words) > self.max_repeats:
      return "repetition"
    return ""

  def _is_near(self, words: Sequence[str], other: Sequence[str]) -> bool:
    if not self.near_duplicates:
      return False
    one, two = map(_pairs, (words, other))
    return len(one & two) >= self.near_duplicates * len(one | two)


def words_of(text: str) -> list[str]:
  """As training reads them."""
  return transforms.pre_caption(text, _MANY_WORDS).split()


def _pairs(words: Sequence[str]) -> set[tuple[str, ...]]:
  # With the ends, so that one word has some, and its place matters.
  ends = ["", *words, ""]
  return set(itertools.pairwise(ends))


def _repeats(words: Sequence[str]) -> int:
  """How often a word follows itself, or a pair of words comes, at most."""
  longest = run = 1
  for word, after in itertools.pairwise(words):
    run = run + 1 if word == after else 1
    longest = max(longest, run)
  pairs = collections.Counter(itertools.pairwise(words))
  return max(longest, *pairs.values(), 1)


class Selection:
  """Rules, applied to one unit after the other.

  A picture that is a file may be in many rows of many units (lists from the web
  have had one with millions of texts); it is one picture all the same.
  """

  def __init__(self, rules: Rules):
    self._rules = rules
    self._kept: dict[str, set[int]] = collections.defaultdict(set)

  def reasons(self, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why each row of a unit is left out; "" for those that are kept."""
    pictures = collections.defaultdict(list)
    for place, row in enumerate(rows):
      pictures[row["image"] or row["key"]].append(place)
    reasons = [""] * len(rows)
    for picture, places in pictures.items():
      found = self._rules.reasons([rows[place] for place in places])
      for place, reason in zip(places, found, strict=True):
        if not reason and rows[place]["image"]:
          reason = self._seen(picture, rows[place]["text"])
        reasons[place] = reason
    return reasons

  def _seen(self, picture: str, text: str) -> str:
    most, kept = self._rules.max_per_image, self._kept[picture]
    # Of millions of texts, a number each.
    text = zlib.crc32(" ".join(words_of(text)).encode())
    if self._rules.near_duplicates and text in kept:
      return "near_duplicate"
    if most and len(kept) >= most:
      return "too_many"
    kept.add(text)
    return ""
