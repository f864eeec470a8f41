"""The correct captions of a scene."""

import numpy as np

from blip_jax.data.scenes.drawing import Object, Scene

# Share of captions that name objects in reading order.
READING_ORDER = 0.85

# Every template names every object and its position, so scenes with different
# content share no description, and held-out retrieval has one correct answer.
_TEMPLATES = {
  (1, "middle"): ("{0} in the middle", "there is {0} in the middle"),
  (1, "left"): ("{0} on the left", "there is {0} on the left"),
  (1, "right"): ("{0} on the right", "there is {0} on the right"),
  (1, "top"): ("{0} at the top", "there is {0} at the top"),
  (1, "bottom"): ("{0} at the bottom", "there is {0} at the bottom"),
  (2, "row"): (
    "{0} to the left of {1}",
    "{0} on the left and {1} on the right",
    "there is {0} left of {1}",
  ),
  (2, "column"): (
    "{0} above {1}",
    "{0} at the top and {1} at the bottom",
    "there is {0} above {1}",
  ),
  (3, "row"): (
    "{0} and {1} and {2} from left to right",
    "from left to right {0} then {1} then {2}",
  ),
  (3, "column"): (
    "{0} and {1} and {2} from top to bottom",
    "from top to bottom {0} then {1} then {2}",
  ),
}
_REVERSED = {
  (2, "row"): ("{1} to the right of {0}", "there is {1} right of {0}"),
  (2, "column"): ("{1} below {0}", "there is {1} under {0}"),
}


def phrase(item: Object, with_size: bool) -> str:
  """Returns the noun phrase of an object, such as "a small red circle"."""
  words = f"{item.colour} {item.shape}"
  if with_size:
    words = f"{item.size} {words}"
  return with_article(words)


def with_article(words: str) -> str:
  return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def describe(scene: Scene, rng: np.random.Generator) -> str:
  """Returns one correct caption, in lower case and without punctuation."""
  kind = (len(scene.objects), scene.layout)
  with_size = scene.sizes_differ and rng.random() < 0.5
  templates = _TEMPLATES[kind]
  if kind in _REVERSED and rng.random() >= READING_ORDER:
    templates = _REVERSED[kind]
  template = templates[rng.integers(len(templates))]
  return template.format(*(phrase(item, with_size) for item in scene.objects))


def descriptions(scene: Scene) -> frozenset[str]:
  """Returns all captions that `describe` can return: all correct captions."""
  kind = (len(scene.objects), scene.layout)
  return frozenset(
    template.format(*(phrase(item, with_size) for item in scene.objects))
    for template in (*_TEMPLATES[kind], *_REVERSED.get(kind, ()))
    for with_size in {False, scene.sizes_differ}
  )
