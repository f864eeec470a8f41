"""N-grams of one to four words, which BLEU and CIDEr count."""

from collections import Counter
from collections.abc import Iterator, Sequence

MAX_N = 4

Ngram = tuple[str, ...]


def count(sentence: str) -> Counter[Ngram]:
  """Counts the n-grams, n from 1 to `MAX_N`, of a tokenised sentence."""
  return Counter(_ngrams(sentence.split()))


def _ngrams(words: Sequence[str]) -> Iterator[Ngram]:
  for n in range(1, MAX_N + 1):
    for start in range(len(words) - n + 1):
      yield tuple(words[start : start + n])
