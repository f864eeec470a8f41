"""CIDEr-D: worked examples, and a plain implementation with matrices."""

import math
import random

import numpy as np
import pytest

from blip_jax.evaluators.scores import cider


def explained(candidates, references):
  """CIDEr-D as one would explain it: vectors over all n-grams there are."""

  def runs(text, n):
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

  texts = [*candidates, *(text for of_one in references for text in of_one)]
  scores = np.zeros(len(candidates))
  for n in (1, 2, 3, 4):
    axes = sorted({ngram for text in texts for ngram in runs(text, n)})
    images = [
      sum(any(a in runs(text, n) for text in texts) for texts in references)
      for a in axes
    ]
    idf = np.log(len(references) / np.maximum(images, 1))

    def vector(text, n=n, axes=axes, idf=idf):
      found = runs(text, n)
      return np.array([found.count(axis) for axis in axes]) * idf

    for i, (candidate, of_one) in enumerate(
      zip(candidates, references, strict=True)
    ):
      for reference in of_one:
        a, b = vector(candidate), vector(reference)
        norm = np.linalg.norm(a) * np.linalg.norm(b)
        cosine = np.minimum(a, b) @ b / norm if norm else 0
        gap = len(candidate.split()) - len(reference.split())
        scores[i] += 10 / 4 * cosine * math.exp(-(gap**2) / 72) / len(of_one)
  return scores


def test_worked_example():
  total, each = cider.cider_d(
    ["a dog", "a cat on grass"], [["a dog", "a dog"], ["a bird on grass"]]
  )
  # "a" is with both images and weighs nothing, all else log(2). The first has
  # runs of one and two words, and they are right.
  assert each[0] == pytest.approx(10 * 2 / 4)
  # Words: 2 of 3. Pairs: 1 of 3. Threes: none of 2. Fours: none of 1.
  assert each[1] == pytest.approx(10 * (2 / 3 + 1 / 3) / 4)
  assert total == pytest.approx(each.mean())


@pytest.mark.parametrize("seed", range(10))
def test_scores_equal_the_matrix_implementation(seed):
  rng = random.Random(seed)
  words = "abcdefgh"[: rng.randint(1, 8)]

  def text():
    return " ".join(rng.choices(words, k=rng.choice([0, 1, 2, 3, 5, 8, 13])))

  candidates = [text() for _ in range(rng.randint(1, 8))]
  references = [[text() for _ in range(rng.randint(1, 4))] for _ in candidates]
  total, each = cider.cider_d(candidates, references)
  np.testing.assert_allclose(
    each, explained(candidates, references), rtol=1e-9, atol=1e-12
  )
  assert total == pytest.approx(each.mean())


def test_the_maximum_is_ten():
  texts = ["two dogs run home", "a cat sat over there", "we ate one red plum"]
  _, each = cider.cider_d(texts, [[text] for text in texts])
  assert each == pytest.approx([10, 10, 10])


def test_repetition_gains_nothing():
  references = [["a red ball", "one red ball"], ["two cats"]]
  scores = [
    cider.cider_d([text, "two cats"], references)[1][0]
    for text in ("red ball", "red red ball ball")
  ]
  assert scores[1] < scores[0]


def test_a_difference_in_length_is_penalised():
  # One word is right; the second candidate is longer by 6.
  references = [["red"], ["blue"]]
  short, long = (
    cider.cider_d([text, "blue"], references)[1][0]
    for text in ("red", "red" + " red" * 6)
  )
  # min(7, 1) * 1 / (7 * 1)
  assert short == pytest.approx(10 / 4)
  assert long == pytest.approx(10 / 4 / 7 * math.exp(-1 / 2))


def test_ngrams_of_all_images_have_no_weight():
  _, each = cider.cider_d(["a", "b"], [["a", "b"], ["b a", "a b"]])
  assert each == pytest.approx([0, 0])


def test_a_single_image_scores_zero():
  assert cider.cider_d(["a dog"], [["a dog"]])[0] == 0


def test_an_empty_caption_scores_zero():
  total, each = cider.cider_d(["", "a b"], [["a dog"], ["", "a b"]])
  assert each[0] == 0 and each[1] > 0 and total == each[1] / 2
  assert cider.cider_d(["", ""], [[""], [""]])[0] == 0


def test_order_of_images_and_references_does_not_matter():
  candidates = ["a dog runs", "one cat sat", "two red balls"]
  references = [["a dog", "dogs run"], ["a cat sat here"], ["red balls", "a"]]
  total, each = cider.cider_d(candidates, references)
  again, back = cider.cider_d(
    candidates[::-1], [texts[::-1] for texts in references[::-1]]
  )
  assert again == pytest.approx(total)
  np.testing.assert_allclose(back[::-1], each)
