"""Dialogs about a scene of two objects, in which words refer to what was said.

The caption names one of the objects. "it" is the object that was talked about
last, and "the other one" the one that was not: who does not read the caption
and the earlier questions cannot know which object is meant.
"""

from typing import NamedTuple

import numpy as np

from blip_jax.data.scenes.asking import ANSWERS, POSITIONS
from blip_jax.data.scenes.drawing import COLOURS, SHAPES, Object, Scene
from blip_jax.data.scenes.texts import with_article

NUM_ROUNDS, NUM_CANDIDATES = 4, 10
# The round that turns to the other object.
_TURN = 2
_KINDS = ("position", "colour", "shape", "yes/no")
_PLACES = tuple(place for places in POSITIONS.values() for place in places)
# What answers to each kind of question there are.
_ANSWERS = {
  "position": _PLACES,
  "colour": tuple(COLOURS),
  "shape": tuple(SHAPES),
  "yes/no": ("yes", "no"),
}


class Exchange(NamedTuple):
  """A question in a dialog, its answer, and the answers to choose from."""

  question: str
  answer: str
  candidates: tuple[str, ...]


class Talk(NamedTuple):
  """A dialog: a caption of one object, and questions about both."""

  caption: str
  rounds: tuple[Exchange, ...]


def talk(scene: Scene, rng: np.random.Generator) -> Talk:
  """Returns a dialog about a scene of two objects; `rng` chooses the words."""
  first = int(rng.integers(2))
  caption = _caption(scene.objects[first], scene.objects[1 - first], rng)
  kinds = [_KINDS[n] for n in rng.permutation(len(_KINDS))]
  rounds = []
  for number, kind in enumerate(kinds):
    index = first if number < _TURN else 1 - first
    what = "the other one" if number == _TURN else "it"
    place = POSITIONS[scene.layout][index]
    question, answer = _ask(kind, what, scene.objects[index], place, rng)
    rounds.append(Exchange(question, answer, _candidates(kind, answer, rng)))
  return Talk(caption, tuple(rounds))


def _caption(item: Object, other: Object, rng: np.random.Generator) -> str:
  """Names an object by what the other one has not."""
  words = []
  if item.colour != other.colour:
    words.append(f"{item.colour} shape")
  if item.shape != other.shape:
    words.append(item.shape)
  return f"a picture of {with_article(words[rng.integers(len(words))])}"


def _ask(
  kind: str, what: str, item: Object, place: str, rng: np.random.Generator
) -> tuple[str, str]:
  if kind == "position":
    return f"where is {what}?", place
  if kind == "yes/no":
    said = item.colour
    if rng.random() < 0.5:
      others = [colour for colour in COLOURS if colour != said]
      said = others[rng.integers(len(others))]
    return f"is {what} {said}?", "yes" if said == item.colour else "no"
  return f"what {kind} is {what}?", getattr(item, kind)


def _candidates(
  kind: str, answer: str, rng: np.random.Generator
) -> tuple[str, ...]:
  """All answers to a kind of question, filled up with others, in any order."""
  own = [text for text in _ANSWERS[kind] if text != answer]
  others = [text for text in ANSWERS if text not in _ANSWERS[kind]]
  rng.shuffle(others)
  texts = [answer, *own, *others][:NUM_CANDIDATES]
  rng.shuffle(texts)
  return tuple(texts)
