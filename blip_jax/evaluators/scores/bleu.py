"""BLEU (Papineni et al., 2002), of a corpus and of each caption."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from blip_jax.evaluators.scores import ngrams

# The official scorer adds them lest it divide by zero, and they show: a caption
# without a right 4-gram has a BLEU-4 that is small, but not 0.
_TINY, _SMALL = 1e-15, 1e-9


def bleu(
  candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[Float[np.ndarray, "4"], Float[np.ndarray, "N 4"]]:
  """Returns BLEU-1 to BLEU-4 of all captions together, and of each.

  The value of all is no mean of the others: n-grams and lengths are added up
  first. An n-gram counts at most as often as one reference has it. A caption is
  too short if its nearest reference (of two as near, the shorter) is longer.

  Args:
    candidates: a caption for each image, as `ptb.tokenize` leaves it.
    references: the right captions of each image, likewise; at least one.
  """
  rows = [_count(*pair) for pair in zip(candidates, references, strict=True)]
  counts = [np.array(column) for column in zip(*rows, strict=True)]
  (total,) = _bleu(*(column.sum(axis=0, keepdims=True) for column in counts))
  return total, _bleu(*counts)


def _count(
  candidate: str, references: Sequence[str]
) -> tuple[list[int], list[int], int]:
  """N-grams that are right, n-grams in all, and the nearest length."""
  found = ngrams.count(candidate)
  most = Counter()
  for reference in references:
    most |= ngrams.count(reference)
  right, written = [0] * ngrams.MAX_N, [0] * ngrams.MAX_N
  for ngram, times in found.items():
    written[len(ngram) - 1] += times
    right[len(ngram) - 1] += min(times, most[ngram])
  lengths = (len(reference.split()) for reference in references)
  nearest = min(lengths, key=lambda length: (abs(length - written[0]), length))
  return right, written, nearest


def _bleu(
  right: Int[np.ndarray, "N 4"],
  written: Int[np.ndarray, "N 4"],
  length: Int[np.ndarray, "N"],
) -> Float[np.ndarray, "N 4"]:
  precision = (right + _TINY) / (written + _SMALL)
  mean = np.cumprod(precision, axis=1) ** (1 / np.arange(1, ngrams.MAX_N + 1))
  ratio = (written[:, 0] + _TINY) / (length + _SMALL)
  brevity = np.exp(np.minimum(1 - 1 / ratio, 0))
  return mean * brevity[:, None]
