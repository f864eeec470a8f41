"""Accuracy and consistency of statements that are true or false."""

import numpy as np
import pytest

from blip_jax.evaluators.scores import truth


def score(predicted, labels, groups, strength=3.0):
  logits = np.where(np.array(predicted)[:, None], [[0, 1.0]], [[1.0, 0]])
  return truth.score(strength * logits, np.array(labels, bool), groups)


def test_a_group_is_consistent_if_all_of_it_is_right():
  scores = score(
    [True, True, False, True, False],
    [True, False, False, True, False],
    ["a", "a", "b", "b", "c"],
  )
  assert scores.accuracy == pytest.approx(80)
  assert scores.consistency == pytest.approx(100 * 2 / 3)
  right, wrong = np.log1p(np.exp(-3)), np.log1p(np.exp(3))
  assert scores.loss == pytest.approx((4 * right + wrong) / 5)


def test_a_wrong_row_counts_whichever_row_of_its_group_it_is():
  for wrong in range(3):
    predicted = [n != wrong for n in range(3)]
    scores = score(predicted, [True] * 3, ["a"] * 3)
    assert scores.consistency == 0


def test_undecided_is_false_and_large_logits_are_no_overflow():
  logits = np.array([[1.0, 1.0], [-1e4, 1e4]], np.float32)
  scores = truth.score(logits, np.array([False, False]), ["a", "b"])
  assert scores.accuracy == 50 and scores.loss == pytest.approx(1e4, rel=1e-3)
