"""ROUGE-L (Lin, 2004): the longest common subsequence of words."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

_BETA = 1.2  # The weight of recall relative to precision.


def rouge_l(
  candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, Float[np.ndarray, "N"]]:
  """Returns the mean ROUGE-L, and that of each caption.

  As in the official scorer, the best precision and the best recall may come
  from different references, and an empty caption is one empty word, which
  matches an empty reference.

  Args:
    candidates: a caption for each image, tokenised by `ptb.tokenize`.
    references: reference captions of each image, likewise; at least one.
  """
  scores = np.array(
    [_rouge_l(*pair) for pair in zip(candidates, references, strict=True)]
  )
  return float(scores.mean()), scores


def _rouge_l(candidate: str, references: Sequence[str]) -> float:
  # Split at plain spaces only: "1 1/2" with a no-break space is one word here,
  # and two for BLEU and CIDEr.
  words = candidate.split(" ")
  truths = [reference.split(" ") for reference in references]
  common = [_common(words, truth) for truth in truths]
  precision = max(common) / len(words)
  recall = max(n / len(truth) for n, truth in zip(common, truths, strict=True))
  if not precision or not recall:
    return 0.0
  weight = _BETA**2
  return (1 + weight) * precision * recall / (recall + weight * precision)


def _common(words: Sequence[str], others: Sequence[str]) -> int:
  """Length of the longest common subsequence, by Hyyrö's (2004) bit vectors.

  Bit i of `row` is 0 where the dynamic programming table increases at word i.
  """
  places = defaultdict(int)
  for i, word in enumerate(words):
    places[word] |= 1 << i
  all_places = row = (1 << len(words)) - 1
  for word in others:
    matches = row & places[word]
    row = ((row + matches) | (row - matches)) & all_places
  return len(words) - row.bit_count()
