"""Recall where scores are equal: which order of them gives a golden value.

The original ranks by NumPy's argsort, which promises no order of equal scores
and differs between processors. So a golden is right if any order gives it.
"""

from collections.abc import Sequence

import numpy as np

from blip_jax.evaluators.scores import recall


def ranked(
  scores: np.ndarray, own: np.ndarray, percents: Sequence[float]
) -> np.ndarray:
  """Ranks candidates so that recall has these values, if any order of equal
  scores gives them; else in some order that is possible.

  Args:
    scores: [R, K] of the candidates of each row, higher is better.
    own: [R, K], which candidates are right; at least one in each row.
    percents: the recall at each k of `recall.KS`.

  Returns:
    [R, K] float32 without equal values, higher is better.
  """
  best = np.where(own, scores, -np.inf).max(axis=1, keepdims=True)
  tied_wrong = (scores == best) & ~own
  # Ranks that the first right candidate can have, counted from 0.
  first = (scores > best).sum(axis=1)
  last = first + tied_wrong.sum(axis=1)
  chosen = last.copy()
  is_open = np.ones(len(scores), bool)
  smallest = 0
  for k, percent in zip(recall.KS, percents, strict=True):
    possible = np.flatnonzero(is_open & (first < k))
    # Rows that have to be found by this k come first, then those that have to
    # be found by the next: this finds an order whenever there is one.
    possible = possible[np.argsort(last[possible], kind="stable")]
    num_hits = round(percent * len(scores) / 100) - np.sum(~is_open)
    num_hits = max(num_hits, np.sum(last[possible] < k))
    hits = possible[:num_hits]
    chosen[hits] = np.maximum(first[hits], smallest)
    is_open[hits] = False
    smallest = k
  ranks = np.empty(scores.shape, np.float32)
  for row, num_before in enumerate(chosen - first):
    among_ties = np.where(tied_wrong[row], -1, 0)
    among_ties[np.flatnonzero(tied_wrong[row])[:num_before]] = 1
    ranks[row, np.lexsort((among_ties, scores[row]))] = range(scores.shape[1])
  return ranks
