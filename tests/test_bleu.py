"""BLEU: worked examples and properties."""

import math

import numpy as np
import pytest

from blip_jax.evaluators.scores import bleu as bleu_lib


def one(candidate, *references):
  """BLEU-1 to BLEU-4 of a single caption."""
  _, each = bleu_lib.bleu([candidate], [references])
  return each[0]


def test_an_exact_reference_scores_one():
  text = "two dogs run over wet sand"
  assert one(text, "a cat", text) == pytest.approx(np.ones(4), abs=1e-8)


def test_worked_example():
  # Right: 4 of 5 words, 2 of 4 pairs (a red, on grass), 0 of 3 and 0 of 2.
  scores = one("a red fox on grass", "a red ball lies on grass", "dry grass")
  # Of 6 words and 2, the 6 are nearer to 5; too short by a sixth.
  brevity = math.exp(1 - 6 / 5)
  assert scores[:2] == pytest.approx(
    [4 / 5 * brevity, math.sqrt(4 / 5 * 2 / 4) * brevity], rel=1e-6
  )
  assert np.all((scores[2:] > 0) & (scores[2:] < 1e-4))


def test_counts_are_clipped_to_those_of_one_reference():
  # "red" is in both, at most twice in one.
  scores = one("red red red red", "red on red grass", "a red ball here")
  assert scores[0] == pytest.approx(2 / 4)


@pytest.mark.parametrize(
  "lengths, brevity",
  [
    ([4], 1),
    ([3], 1),
    ([5], math.exp(1 - 5 / 4)),
    ([5, 3], 1),  # Of two as near, the shorter.
    ([3, 5], 1),
    ([1, 5], math.exp(1 - 5 / 4)),
    ([9, 2], 1),
  ],
)
def test_the_closest_reference_decides_the_brevity_penalty(lengths, brevity):
  references = [" ".join(["a"] * length) for length in lengths]
  right = min(4, max(lengths))
  assert one("a a a a", *references)[0] == pytest.approx(right / 4 * brevity)


def test_the_corpus_score_is_not_the_mean():
  candidates = ["a b c d", "x"]
  references = [["a b c d"], ["y z"]]
  total, each = bleu_lib.bleu(candidates, references)
  assert each[:, 0] == pytest.approx([1, 0])
  # 4 of 5 words are right; 5 words for 6.
  assert total[0] == pytest.approx(4 / 5 * math.exp(1 - 6 / 5))
  # 3 of 3 pairs: the second caption has none.
  assert total[1] == pytest.approx(math.sqrt(4 / 5) * math.exp(1 - 6 / 5))


@pytest.mark.parametrize("references", [["a dog"], [""], ["", "a dog"]])
def test_an_empty_caption_scores_zero(references):
  assert one("", *references) == pytest.approx(np.zeros(4), abs=1e-6)
  total, _ = bleu_lib.bleu(["", "a dog"], [references, ["a dog"]])
  assert np.all(np.isfinite(total))


def test_the_corpus_score_of_one_image_is_its_score():
  total, each = bleu_lib.bleu(["a b a d e"], [["a b c d e f", "a d e"]])
  np.testing.assert_array_equal(total, each[0])


def test_words_are_split_at_any_space():
  # As in the official scorer: "1 1/2" is one token, but two words.
  assert one("1\xa01/2", "1 1/2")[1] == pytest.approx(1)
