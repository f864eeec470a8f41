"""ROUGE-L: worked examples, and plain dynamic programming."""

import random

import numpy as np
import pytest

from blip_jax.evaluators.scores import rouge


def one(candidate, *references):
  _, each = rouge.rouge_l([candidate], [references])
  return each[0]


def f_score(precision, recall):
  return 2.44 * precision * recall / (recall + 1.44 * precision)


def table(words, others):
  """The longest common subsequence, as textbooks find it."""
  row = [0] * (len(others) + 1)
  for word in words:
    above = row
    row = [0]
    for i, other in enumerate(others):
      row.append(above[i] + 1 if word == other else max(above[i + 1], row[i]))
  return row[-1]


def test_worked_example():
  # In common: a dog ... grass.
  assert one("a dog on grass", "a big dog in tall grass") == pytest.approx(
    f_score(3 / 4, 3 / 6)
  )


def test_order_matters():
  assert one("a b c d", "d c b a") == pytest.approx(f_score(1 / 4, 1 / 4))


def test_precision_and_recall_may_come_from_different_references():
  score = one("a b c d", "a b c x y z", "d")
  assert score == pytest.approx(f_score(3 / 4, 1))


def test_an_exact_reference_scores_one():
  assert one("a b c", "x", "a b c") == pytest.approx(1)
  assert one("a", "a") == pytest.approx(1)


def test_no_common_words_score_zero():
  assert one("a b", "c d", "e") == 0
  assert one("", "a b") == 0
  assert one("a b", "") == 0


def test_an_empty_caption_matches_an_empty_reference_as_officially():
  assert one("", "") == pytest.approx(1)


def test_a_no_break_space_does_not_split_a_word():
  assert one("1\xa01/2 cups", "1 1/2 cups") == pytest.approx(
    f_score(1 / 2, 1 / 3)
  )


def test_total_is_the_mean():
  total, each = rouge.rouge_l(["a", "b"], [["a"], ["c"]])
  np.testing.assert_allclose(each, [1, 0])
  assert total == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(20))
def test_the_common_subsequence_equals_the_textbook_algorithm(seed):
  rng = random.Random(seed)
  for _ in range(50):
    words, others = (
      rng.choices("abcde"[: rng.randint(1, 5)], k=rng.choice([0, 3, 9, 70]))
      for _ in range(2)
    )
    assert rouge._common(words, others) == table(words, others)
