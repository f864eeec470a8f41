"""CIDEr-D (Vedantam et al., 2015): what most people say, weighed by rarity."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from blip_jax.evaluators.scores import ngrams

_SIGMA = 6.0  # words by which lengths may differ


def cider_d(
  candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, Float[np.ndarray, "N"]]:
  """Returns the mean CIDEr-D, and that of each caption, in [0, 10].

  Papers report it times 100. An n-gram weighs the less, the more images have it
  among their references: the scores depend on which images are scored, and of
  one image alone everything weighs, and scores, 0.

  Args:
    candidates: a caption for each image, as `ptb.tokenize` leaves it.
    references: the right captions of each image, likewise; at least one.
  """
  counts = [[ngrams.count(text) for text in texts] for texts in references]
  images = Counter()
  for of_image in counts:
    images.update(set().union(*of_image))
  # An n-gram of no reference weighs like one of a single image.
  most = math.log(len(counts))
  rarity = {ngram: most - math.log(n) for ngram, n in images.items()}

  scores = []
  for candidate, of_image in zip(candidates, counts, strict=True):
    vector = _Vector(ngrams.count(candidate), rarity, most)
    others = [_Vector(of_one, rarity, most) for of_one in of_image]
    scores.append(10 * np.mean([vector.similarity(other) for other in others]))
  return float(np.mean(scores)), np.array(scores)


class _Vector:
  """TF-IDF of the n-grams in a sentence."""

  def __init__(
    self,
    counts: Mapping[ngrams.Ngram, int],
    rarity: Mapping[ngrams.Ngram, float],
    default: float,
  ):
    self.weights = {g: n * rarity.get(g, default) for g, n in counts.items()}
    squares = [0.0] * ngrams.MAX_N
    for ngram, weight in self.weights.items():
      squares[len(ngram) - 1] += weight**2
    self.norms = [math.sqrt(square) for square in squares]
    self.length = sum(n for ngram, n in counts.items() if len(ngram) == 1)

  def similarity(self, reference: "_Vector") -> float:
    """Mean over n of the cosine, where no n-gram gains by being repeated."""
    dots = [0.0] * ngrams.MAX_N
    for ngram, weight in self.weights.items():
      right = reference.weights.get(ngram, 0.0)
      dots[len(ngram) - 1] += min(weight, right) * right
    cosines = [
      dot / (norm * other) if norm and other else 0.0
      for dot, norm, other in zip(
        dots, self.norms, reference.norms, strict=True
      )
    ]
    gap = self.length - reference.length
    return math.exp(-(gap**2) / (2 * _SIGMA**2)) * sum(cosines) / ngrams.MAX_N
