"""Statements about two scenes, and which pairs of scenes make them true.

"left" and "right" always mean images, never places in one, so that they can be
exchanged together with the images.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from blip_jax.data.scenes.drawing import KINDS
from blip_jax.data.scenes.texts import with_article

STATEMENT_KINDS = ("which", "both", "only", "more", "total")
_COUNTS = (1, 2, 3)
_NUMBERS = {3: "three", 4: "four", 5: "five"}
_PAIRS = tuple((left, right) for left in _COUNTS for right in _COUNTS)
_SIDES = ("left", "right")

_WHICH = ("the {0} image has {1}", "there is {1} in the {0} image")
_BOTH = ("both images have {0}", "there is {0} in each image")
_ONLY = ("only one image has {0}", "there is {0} in exactly one of the images")
_MORE = (
  "the {0} image has more shapes than the {1} image",
  "there are fewer shapes in the {1} image than in the {0} image",
)
_TOTAL = (
  "there are {0} shapes in the two images",
  "the two images show {0} objects in all",
)

# A colour and a shape of an object, "" for any.
Named = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Side:
  """What is known about one of the two scenes.

  Attributes:
    count: number of its objects.
    named: an object that it has or lacks; ("", "") if that is all the same.
    has: whether it has such an object.
  """

  count: int = 2
  named: Named = ("", "")
  has: bool = True

  def fits(self, kinds: Sequence[Named]) -> bool:
    """Whether this can be said of a scene with objects of these kinds."""
    colour, shape = self.named
    found = any(
      colour in ("", kind[0]) and shape in ("", kind[1]) for kind in kinds
    )
    return len(kinds) == self.count and found == self.has


@dataclasses.dataclass(frozen=True)
class Statement:
  """A statement about two scenes.

  Attributes:
    kind: one of `STATEMENT_KINDS`.
    text: in lower case.
    true: pairs of a left and a right scene that make it true.
    false: pairs that make it false.
  """

  kind: str
  text: str
  true: tuple[tuple[Side, Side], ...]
  false: tuple[tuple[Side, Side], ...]


def state(number: int, rng: np.random.Generator) -> Statement:
  """Returns statement `number`; kinds take turns, `rng` chooses the words."""
  kind = STATEMENT_KINDS[number % len(STATEMENT_KINDS)]
  if kind in ("more", "total"):
    return _of_counts(kind, rng)
  named = _named(rng)
  what = with_article(f"{named[0]} {named[1] or 'shape'}".strip())
  has, lacks = Side(named=named), Side(named=named, has=False)
  one = ((has, lacks), (lacks, has))
  if kind == "which":
    side = int(rng.integers(2))
    text = _choose(_WHICH, rng).format(_SIDES[side], what)
    return Statement(kind, text, (one[side],), (one[1 - side],))
  if kind == "both":
    text = _choose(_BOTH, rng).format(what)
    return Statement(kind, text, ((has, has),), one)
  text = _choose(_ONLY, rng).format(what)
  return Statement(kind, text, one, ((has, has), (lacks, lacks)))


def _named(rng: np.random.Generator) -> Named:
  """A colour, a shape, or both."""
  colour, shape = KINDS[rng.integers(len(KINDS))]
  return ((colour, ""), ("", shape), (colour, shape))[rng.integers(3)]


def _of_counts(kind: str, rng: np.random.Generator) -> Statement:
  if kind == "more":
    more, fewer = _SIDES if rng.random() < 0.5 else _SIDES[::-1]
    text = _choose(_MORE, rng).format(more, fewer)
    sign = 1 if more == "left" else -1
    true = [pair for pair in _PAIRS if sign * (pair[0] - pair[1]) > 0]
    false = [pair for pair in _PAIRS if pair not in true]
  else:
    total = [*_NUMBERS][rng.integers(len(_NUMBERS))]
    text = _choose(_TOTAL, rng).format(_NUMBERS[total])
    true = [pair for pair in _PAIRS if sum(pair) == total]
    false = [pair for pair in _PAIRS if abs(sum(pair) - total) == 1]
  sides = lambda pairs: tuple((Side(a), Side(b)) for a, b in pairs)
  return Statement(kind, text, sides(true), sides(false))


def _choose(texts: Sequence[str], rng: np.random.Generator) -> str:
  return texts[int(rng.integers(len(texts)))]
