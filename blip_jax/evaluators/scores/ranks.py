"""Scores of rankings of candidate answers, as VisDial's.

Candidates with equal scores get their expected value under random tie-breaking,
so that a model with constant scores gets exactly chance. Without ties, the
numbers are those of VisDial's evaluation server.

Dimensions: n candidates of a round.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

KS = (1, 5, 10)


class Right(NamedTuple):
  """Where the right candidate is in a ranking.

  Attributes:
    mrr: the reciprocal of its rank.
    r1, r5, r10: whether it is among the first so many.
    mean_rank: its rank, from 1 on.
  """

  mrr: float
  r1: float
  r5: float
  r10: float
  mean_rank: float


def ranks(scores: Float[np.ndarray, " n"]) -> list[int]:
  """Returns the rank of each candidate, 1 for the highest score.

  Among equal scores, the order is that of the candidates.
  """
  order = np.argsort(-scores, kind="stable")
  places = np.empty(len(scores), int)
  places[order] = np.arange(1, len(scores) + 1)
  return places.tolist()


def right(scores: Float[np.ndarray, " n"], index: int) -> Right:
  """Returns where the right candidate is.

  Args:
    scores: of the candidates, higher is better.
    index: of the right one.

  Raises:
    ValueError: a score is NaN.
  """
  _refuse_nan(scores)
  above = int((scores > scores[index]).sum())
  tied = int((scores == scores[index]).sum())
  places = np.arange(above + 1, above + tied + 1)
  mrr, mean_rank = float((1 / places).mean()), float(places.mean())
  r1, r5, r10 = (float((places <= k).mean()) for k in KS)
  return Right(mrr, r1, r5, r10, mean_rank)


def ndcg(
  scores: Float[np.ndarray, " n"], relevance: Sequence[float]
) -> float | None:
  """Returns the normalised discounted cumulative gain of a ranking.

  As VisDial defines it, only as many candidates count as have any relevance,
  those of the first ranks, and the gain is the relevance itself.

  Args:
    scores: of the candidates, higher is better.
    relevance: of each of them, from 0 to 1.

  Returns:
    From 0 to 1; None if no candidate is relevant.

  Raises:
    ValueError: a score is NaN.
  """
  _refuse_nan(scores)
  gain = np.asarray(relevance, np.float64)
  k = int((gain != 0).sum())
  if not k:
    return None
  discount = 1 / np.log2(np.arange(len(gain)) + 2)
  discount[k:] = 0
  _, group = np.unique(-scores, return_inverse=True)
  # What a candidate of a group of equal scores is expected to gain.
  mean_gain = np.bincount(group, gain) / np.bincount(group)
  expected = mean_gain[np.sort(group)]
  best = np.sort(gain)[::-1]
  return float((discount * expected).sum() / (discount * best).sum())


def _refuse_nan(scores: Float[np.ndarray, " n"]) -> None:
  # Comparisons with NaN are false, also those that would rank it low.
  if np.isnan(scores).any():
    raise ValueError(
      f"scores: expected numbers, found NaN for {int(np.isnan(scores).sum())} "
      f"of {len(scores)} candidates"
    )
