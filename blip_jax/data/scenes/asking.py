"""Questions about a scene, and their answers.

Whoever sees only a question can do no better than guess: given its text, all
answers of its kind are equally likely, since colours, shapes and positions of
scenes are.
"""

from typing import NamedTuple

import numpy as np

from blip_jax.data.scenes.drawing import COLOURS, KINDS, SHAPES, Object, Scene
from blip_jax.data.scenes.texts import phrase

QUESTION_KINDS = ("count", "colour", "shape", "position", "yes/no")
_COUNTS = ("one", "two", "three")
POSITIONS = {"row": ("left", "right"), "column": ("top", "bottom")}
# All answers, in the order of the kinds.
ANSWERS = (
  *_COUNTS,
  *COLOURS,
  *SHAPES,
  *(place for places in POSITIONS.values() for place in places),
  "yes",
  "no",
)
_HOW_MANY = (
  "how many shapes are there?",
  "how many objects are in the picture?",
)
_WHERE = {"left": "on the left", "right": "on the right"}
_WHERE |= {"top": "at the top", "bottom": "at the bottom"}


class Question(NamedTuple):
  """A question about a scene.

  Attributes:
    kind: one of `QUESTION_KINDS`.
    text: in lower case.
    answer: one of `ANSWERS`.
  """

  kind: str
  text: str
  answer: str


def num_objects(index: int) -> int:
  """The number of objects in the scene that question `index` is about.

  It is two, but for questions of the kind "count".
  """
  turn, kind = divmod(index, len(QUESTION_KINDS))
  return turn % len(_COUNTS) + 1 if QUESTION_KINDS[kind] == "count" else 2


def ask(index: int, scene: Scene, rng: np.random.Generator) -> Question:
  """Returns question `index`; kinds take turns.

  Args:
    scene: of `num_objects(index)` objects.
    rng: chooses the object and the words.
  """
  kind = QUESTION_KINDS[index % len(QUESTION_KINDS)]
  if kind == "count":
    text = _HOW_MANY[rng.integers(len(_HOW_MANY))]
    return Question(kind, text, _COUNTS[len(scene.objects) - 1])
  if kind == "yes/no":
    return _yes_or_no(scene, rng)
  number = int(rng.integers(len(scene.objects)))
  item, place = scene.objects[number], POSITIONS[scene.layout][number]
  if kind == "position":
    return Question(kind, f"where is the {item.colour} {item.shape}?", place)
  asked, named = item.colour, item.shape
  if kind == "shape":
    asked, named = named, asked
  # By its shape or its colour, if no other object has that, or its position.
  names = [name for other in scene.objects for name in _names(other)]
  is_unique = names.count(named) == 1
  if is_unique and rng.random() < 0.5:
    what = named if kind == "colour" else f"{named} object"
  else:
    what = f"shape {_WHERE[place]}" if kind == "colour" else ""
    what = what or f"object {_WHERE[place]}"
  return Question(kind, f"what {kind} is the {what}?", asked)


def _names(item: Object) -> tuple[str, str]:
  return item.colour, item.shape


def _yes_or_no(scene: Scene, rng: np.random.Generator) -> Question:
  answer = ("yes", "no")[rng.integers(2)]
  there = {_names(item) for item in scene.objects}
  colour, shape = _names(scene.objects[rng.integers(len(scene.objects))])
  while answer == "no" and (colour, shape) in there:
    # Half of the wrong objects have the colour or the shape of a right one.
    change = rng.integers(4)
    other = KINDS[rng.integers(len(KINDS))]
    colour = colour if change == 0 else other[0]
    shape = shape if change == 1 else other[1]
  item = Object(shape, colour, "large", 0.5, 0.5)
  return Question("yes/no", f"is there {phrase(item, False)}?", answer)
