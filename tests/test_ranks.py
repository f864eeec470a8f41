"""Scores of rankings: numbers by hand, ties, VisDial's definition of NDCG."""

import math

import numpy as np
import pytest

from blip_jax.evaluators.scores import ranks

SCORES = np.array([0.3, -1.0, 2.0, 0.9], np.float32)


def test_ranks_start_at_one_and_ties_keep_their_order():
  assert ranks.ranks(SCORES) == [3, 4, 1, 2]
  assert ranks.ranks(np.array([1.0, 2.0, 1.0])) == [2, 1, 3]


@pytest.mark.parametrize(
  "index, rank", [(2, 1), (3, 2), (0, 3), (1, 4)], ids=str
)
def test_the_rank_of_the_right_candidate(index, rank):
  assert ranks.right(SCORES, index) == (1 / rank, rank <= 1, 1, 1, rank)


def test_a_rank_beyond_five_and_ten():
  scores = -np.arange(12.0)
  assert ranks.right(scores, 5) == (1 / 6, 0, 0, 1, 6)
  assert ranks.right(scores, 10) == (1 / 11, 0, 0, 0, 11)


def test_ties_score_their_expected_value():
  """One above, and three tied: ranks 2, 3 and 4."""
  found = ranks.right(np.array([1.0, 3.0, 1.0, 0.0, 1.0]), 2)
  assert found.mrr == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
  assert found.mean_rank == 3 and found.r1 == 0 and found.r5 == 1
  constant = ranks.right(np.zeros(100), 3)
  assert constant.r1 == pytest.approx(0.01)
  assert constant.r10 == pytest.approx(0.1)
  assert constant.mean_rank == 50.5


def test_ndcg_by_hand():
  """Two candidates have relevance, so the first two ranks count."""
  relevance = (0.0, 0.5, 1.0, 0.0)
  # The order is 2, 3, 0, 1.
  expected = 1.0 / (1.0 + 0.5 / math.log2(3))
  assert ranks.ndcg(SCORES, relevance) == pytest.approx(expected)
  # The other way round, the candidates that count are irrelevant and 0.5.
  expected = 0.5 / (1.0 + 0.5 / math.log2(3))
  assert ranks.ndcg(-SCORES, relevance) == pytest.approx(expected)
  assert ranks.ndcg(np.array(relevance), relevance) == pytest.approx(1)
  assert ranks.ndcg(SCORES, [0.0] * 4) is None


def reference(scores, relevance):
  """NDCG from ranks, candidate by candidate."""
  k = sum(x != 0 for x in relevance)
  order = sorted(range(len(scores)), key=lambda n: -scores[n])
  dcg = lambda gains: sum(
    gain / math.log2(rank + 1) for rank, gain in enumerate(gains[:k], 1)
  )
  best = dcg(sorted(relevance, reverse=True))
  return dcg([relevance[n] for n in order]) / best


def test_ndcg_of_many_rankings():
  rng = np.random.default_rng(0)
  for _ in range(50):
    scores = rng.standard_normal(100).astype(np.float32)
    relevance = rng.integers(0, 6, 100) / 5 * (rng.random(100) < 0.1)
    relevance[7] = 1
    expected = reference(scores.tolist(), relevance.tolist())
    assert ranks.ndcg(scores, relevance.tolist()) == pytest.approx(expected)


def test_ndcg_of_ties_is_the_mean_over_their_orders():
  relevance = [0.2, 1.0, 0.0, 0.6, 0.0]
  scores = np.array([1.0, 2.0, 2.0, 1.0, 1.0])
  rng = np.random.default_rng(0)
  broken = [
    reference((scores + 1e-3 * rng.random(5)).tolist(), relevance)
    for _ in range(20_000)
  ]
  expected = pytest.approx(np.mean(broken), abs=4e-3)
  assert ranks.ndcg(scores, relevance) == expected


def test_nan_is_refused():
  scores = np.array([1.0, np.nan])
  with pytest.raises(ValueError, match="NaN for 1 of 2 candidates"):
    ranks.right(scores, 0)
  with pytest.raises(ValueError, match="NaN for 1 of 2 candidates"):
    ranks.ndcg(scores, [1.0, 0.0])
