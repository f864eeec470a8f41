"""Which texts of an image go into the new training set."""

import collections
import dataclasses
import itertools
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from blip_jax.capfilt import label, markup
from blip_jax.data import transforms

_MAX_WORDS = 10_000
# Texts of an image that are kept without another limit. An image with more is
# a placeholder, and each text is compared with those that are kept.
MAX_PER_IMAGE = 1_000
# Words of a text whose pairs are compared; what is behind them is one word.
MAX_COMPARED_WORDS = 200
# Of one text of an image with another. After that only equal ones are found.
MAX_COMPARISONS = 1_000_000

# Word pairs of a text, each as its number among those of the image.
_Pairs = frozenset[int]


@dataclasses.dataclass(frozen=True)
class Rules:
  """Conditions for keeping a text.

  Attributes:
    threshold: the least `itm_prob`; 0 ignores the filter.
    sources: that may be kept, of "web" and "synthetic".
    min_words: of a text.
    max_words: of a text; 0: no limit.
    max_repeats: how often a word may be repeated in a row, or a pair of words
      may occur; 0: no limit.
    markup: whether a text may have remains of a web page; see
      `capfilt.markup`.
    near_duplicates: a text is dropped if the Jaccard similarity of its word
      pairs to those of a better text of the same image is at least this; 1
      drops equal texts only, 0 drops none. What is behind the first
      `MAX_COMPARED_WORDS` counts as one word.
    max_per_image: texts of an image, those of the highest `itm_prob`; 0:
      `MAX_PER_IMAGE`.

  Raises:
    ValueError: a value is out of range.
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
      ("min_words", 0, _MAX_WORDS),
      ("max_words", 0, _MAX_WORDS),
      ("max_repeats", 0, _MAX_WORDS),
      ("max_per_image", 0, _MAX_WORDS),
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
    """Returns why each text of one image is dropped; "" if it is kept.

    Args:
      texts: rows of `capfilt.rows`, all of the same image.
    """
    reasons = [self._reason(text) for text in texts]
    best_first = sorted(
      (index for index, reason in enumerate(reasons) if not reason),
      # The first of equally probable texts, which is a web text if any is.
      key=lambda index: (-texts[index]["itm_prob"], index),
    )
    pairs = _numbered((i, words_of(texts[i]["text"])) for i in best_first)
    kept = _Kept(self.near_duplicates, pairs.values())
    for index in best_first:
      if kept.has_near(pairs[index]):
        reasons[index] = "near_duplicate"
      elif len(kept) >= self.limit:
        reasons[index] = "too_many"
      else:
        kept.add(pairs[index])
    return reasons

  @property
  def limit(self) -> int:
    """The most texts of an image that are kept."""
    return self.max_per_image or MAX_PER_IMAGE

  def _reason(self, text: dict[str, Any]) -> str:
    """Why a text is dropped, whatever the other texts of its image are."""
    if bad := why_bad(text):
      return bad
    if text["source"] not in self.sources:
      return "other_source"
    if text["itm_prob"] < self.threshold:
      return "below_threshold"
    if not self.markup and markup.is_in(text["text"]):
      return "markup"
    words = words_of(text["text"])
    if len(words) < self.min_words:
      return "too_short"
    if self.max_words and len(words) > self.max_words:
      return "too_long"
    if self.max_repeats and _num_repeats(words) > self.max_repeats:
      return "repetition"
    return ""


class _Kept:
  """The word pairs of the texts of an image that are kept so far.

  Texts that are similar share one of their rare pairs: of n pairs, all but
  n - ceil(similarity n) are shared, so one of the first n - ceil(similarity n)
  + 1 is, in any order that is the same for all texts. So a text is compared
  only with those that have one of these in common.

  Args:
    similarity: the least Jaccard similarity of near-duplicates; 0: there are
      none.
    all_pairs: of all texts of the image.
  """

  def __init__(self, similarity: float, all_pairs: Iterable[_Pairs]):
    self._similarity = similarity
    self._counts = collections.Counter(itertools.chain.from_iterable(all_pairs))
    self._texts: list[_Pairs] = []
    self._different: set[_Pairs] = set()
    self._with_pair: dict[int, list[int]] = collections.defaultdict(list)
    self._num_comparisons = 0

  def __len__(self) -> int:
    return len(self._texts)

  def add(self, pairs: _Pairs) -> None:
    for pair in self._rare(pairs):
      self._with_pair[pair].append(len(self._texts))
    self._texts.append(pairs)
    self._different.add(pairs)

  def has_near(self, pairs: _Pairs) -> bool:
    if not self._similarity:
      return False
    if pairs in self._different:
      return True
    if self._num_comparisons >= MAX_COMPARISONS:
      return False
    candidates = {i for p in self._rare(pairs) for i in self._with_pair[p]}
    self._num_comparisons += len(candidates)
    return any(self._is_near(pairs, self._texts[i]) for i in candidates)

  def _rare(self, pairs: _Pairs) -> list[int]:
    if self._similarity in (0, 1):  # nothing is similar, or only what is equal
      return []
    # Rounding must not leave out a pair.
    num_shared = math.ceil(self._similarity * len(pairs) - 1e-9)
    rarest_first = sorted(pairs, key=lambda pair: (self._counts[pair], pair))
    return rarest_first[: len(pairs) - num_shared + 1]

  def _is_near(self, pairs: _Pairs, others: _Pairs) -> bool:
    num_shared = len(pairs & others)
    num_all = len(pairs) + len(others) - num_shared
    return num_shared >= self._similarity * num_all


def why_bad(text: dict[str, Any]) -> str:
  """Why a row has no scores that can be used; "" if it has."""
  if text["itm_prob"] is None:
    return text["reason"] or label.BAD_SCORE
  scores = (text.get(name) for name in label.SCORES)
  return "" if label.are_finite(*scores) else label.BAD_SCORE


def words_of(text: str) -> list[str]:
  """Splits a text into words, after the preprocessing of training."""
  return transforms.pre_caption(text, _MAX_WORDS).split()


def _numbered(
  texts: Iterable[tuple[int, Sequence[str]]],
) -> dict[int, _Pairs]:
  """Word pairs of texts by their index, as numbers, which compare faster."""
  numbers: dict[tuple[str, str], int] = {}
  return {
    index: frozenset(
      numbers.setdefault(pair, len(numbers)) for pair in _word_pairs(words)
    )
    for index, words in texts
  }


def _word_pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
  # With both ends of the text: a single word has pairs, too, and the first and
  # last words count by their position.
  rest = " ".join(words[MAX_COMPARED_WORDS:])
  return itertools.pairwise(["", *words[:MAX_COMPARED_WORDS], rest])


def _num_repeats(words: Sequence[str]) -> int:
  """Longest run of one word, or occurrences of a pair of words if more."""
  longest = run = 1
  for word, next_word in itertools.pairwise(words):
    run = run + 1 if word == next_word else 1
    longest = max(longest, run)
  pair_counts = collections.Counter(itertools.pairwise(words))
  return max(longest, *pair_counts.values(), 1)


class Selection:
  """Applies rules to one work unit after the other.

  An image file may occur in several rows of several work units: lists from the
  web had one with millions of texts. All its rows count as one image.
  """

  def __init__(self, rules: Rules):
    self._rules = rules
    # Image file -> hashes of the texts that are kept.
    self._kept: dict[str, set[int]] = collections.defaultdict(set)

  def reasons(self, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns why each row of a work unit is dropped; "" if it is kept."""
    indices_by_image = collections.defaultdict(list)
    for index, row in enumerate(rows):
      indices_by_image[row["image"] or row["key"]].append(index)
    reasons = [""] * len(rows)
    for image, indices in indices_by_image.items():
      image_reasons = self._rules.reasons([rows[index] for index in indices])
      for index, reason in zip(indices, image_reasons, strict=True):
        if not reason and rows[index]["image"]:
          reason = self._reason_among_kept(image, rows[index]["text"])
        reasons[index] = reason
    return reasons

  def _reason_among_kept(self, image: str, text: str) -> str:
    """Compares a text with those that earlier rows of its image file have."""
    kept = self._kept[image]
    # A number for each text, as there may be millions.
    text_hash = zlib.crc32(" ".join(words_of(text)).encode())
    if self._rules.near_duplicates and text_hash in kept:
      return "near_duplicate"
    if len(kept) >= self._rules.limit:
      return "too_many"
    kept.add(text_hash)
    return ""
