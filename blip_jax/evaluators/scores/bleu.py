"""BLEU (Papineni et al., 2002) of a corpus and of each caption."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from blip_jax.evaluators.scores import ngrams

# The official scorer adds these to avoid division by zero, with a visible
# effect: a caption without a matching 4-gram has a small BLEU-4, not 0.
_TINY, _SMALL = 1e-15, 1e-9


def bleu(
  candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[Float[np.ndarray, "4"], Float[np.ndarray, "N 4"]]:
  """Returns BLEU-1 to BLEU-4 of the corpus, and of each caption.

  The corpus value is not the mean of the captions' values: n-gram counts and
  lengths are summed first. An n-gram counts at most as often as it occurs in
  one reference. The brevity penalty applies to a caption that is shorter than
  the reference of the closest length (the shorter one if two are as close).

  Args:
    candidates: a caption for each image, tokenised by `ptb.tokenize`.
    references: reference captions of each image, likewise; at least one.
  """
  rows = [_count(*pair) for pair in zip(candidates, references, strict=True)]
  counts = [np.array(column) for column in zip(*rows, strict=True)]
  (total,) = _bleu(*(column.sum(axis=0, keepdims=True) for column in counts))
  return total, _bleu(*counts)


def _count(
  candidate: str, references: Sequence[str]
) -> tuple[list[int], list[int], int]:
  """Matching n-grams and all n-grams, by n; the closest reference length."""
  max_counts = Counter()
  for reference in references:
    max_counts |= ngrams.count(reference)
  matching, total = [0] * ngrams.MAX_N, [0] * ngrams.MAX_N
  for ngram, count in ngrams.count(candidate).items():
    total[len(ngram) - 1] += count
    matching[len(ngram) - 1] += min(count, max_counts[ngram])
  lengths = (len(reference.split()) for reference in references)
  closest = min(lengths, key=lambda length: (abs(length - total[0]), length))
  return matching, total, closest


def _bleu(
  matching: Int[np.ndarray, "N 4"],
  total: Int[np.ndarray, "N 4"],
  reference_length: Int[np.ndarray, "N"],
) -> Float[np.ndarray, "N 4"]:
  precision = (matching + _TINY) / (total + _SMALL)
  mean = np.cumprod(precision, axis=1) ** (1 / np.arange(1, ngrams.MAX_N + 1))
  ratio = (total[:, 0] + _TINY) / (reference_length + _SMALL)
  brevity = np.exp(np.minimum(1 - 1 / ratio, 0))
  return mean * brevity[:, None]
