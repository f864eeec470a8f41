"""CIDEr-D (Vedantam et al., 2015): consensus in TF-IDF-weighted n-grams."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from blip_jax.evaluators.scores import ngrams

_SIGMA = 6.0  # of the Gaussian length penalty, in words


def cider_d(
  candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, Float[np.ndarray, "N"]]:
  """Returns the mean CIDEr-D, and that of each caption, in [0, 10].

  Papers report it times 100. The weight of an n-gram falls with the number of
  images that have it in their references, so that scores depend on the set of
  images; with a single image, all weights and scores are 0.

  Args:
    candidates: a caption for each image, tokenised by `ptb.tokenize`.
    references: reference captions of each image, likewise; at least one.
  """
  counts = [[ngrams.count(text) for text in texts] for texts in references]
  document_frequency = Counter()
  for image_counts in counts:
    document_frequency.update(set().union(*image_counts))
  # An n-gram that no reference has counts as one that a single image has.
  max_idf = math.log(len(counts))
  idf = {g: max_idf - math.log(n) for g, n in document_frequency.items()}

  scores = []
  for candidate, image_counts in zip(candidates, counts, strict=True):
    vector = _Vector(ngrams.count(candidate), idf, max_idf)
    truths = [_Vector(count, idf, max_idf) for count in image_counts]
    scores.append(10 * np.mean([vector.similarity(truth) for truth in truths]))
  return float(np.mean(scores)), np.array(scores)


class _Vector:
  """TF-IDF weights of the n-grams in a sentence."""

  def __init__(
    self,
    counts: Mapping[ngrams.Ngram, int],
    idf: Mapping[ngrams.Ngram, float],
    default_idf: float,
  ):
    self.weights = {g: n * idf.get(g, default_idf) for g, n in counts.items()}
    squares = [0.0] * ngrams.MAX_N
    for ngram, weight in self.weights.items():
      squares[len(ngram) - 1] += weight**2
    self.norms = [math.sqrt(square) for square in squares]
    self.length = sum(n for ngram, n in counts.items() if len(ngram) == 1)

  def similarity(self, reference: "_Vector") -> float:
    """Mean over n of the cosines, clipped so that repetition gains nothing."""
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
