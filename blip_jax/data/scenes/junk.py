"""What stands in a collection where a caption should."""

import dataclasses

import numpy as np

from blip_jax.data.scenes.drawing import COLOURS, SHAPES, Scene
from blip_jax.data.scenes.texts import describe, phrase

_BOILERPLATE = (
  "Click to enlarge",
  "Image not available",
  "Free shipping on all orders",
  "Sign up for our newsletter",
  "Photo by admin",
  "Stock photo, download now",
  "Page {} of {}",
)
_VAGUE = (
  "a picture",
  "two shapes",
  "shapes on paper",
  "some colored shapes",
  "a drawing of shapes",
  "an object beside another object",
)
_FILE_NAMES = ("IMG_{:04d}.jpg", "DSC{:05d}.JPG", "image-{}.png", "scan {}.tif")
# Kinds of junk, each as often as it is had: junk that is easy to tell, or such
# as the web has, much of which is nearly true.
MIXES = {
  "plain": ("swap", "swap", "boilerplate", "file_name"),
  "web": (
    *("near_miss",) * 8,
    *("vague",) * 4,
    *("swap",) * 3,
    *("boilerplate",) * 3,
    *("file_name",) * 2,
  ),
}


def write(kind: str, scene: Scene, rng: np.random.Generator) -> str:
  """Junk of any kind but "swap", which takes other scenes."""
  if kind == "near_miss":
    return describe(_nearly(scene, rng), rng)
  if kind == "vague":
    return _say_little(scene, rng)
  phrases = _BOILERPLATE if kind == "boilerplate" else _FILE_NAMES
  template = phrases[rng.integers(len(phrases))]
  return template.format(*rng.integers(1, 10_000, 2))


def _nearly(scene: Scene, rng: np.random.Generator) -> Scene:
  """A scene that no description of this one is true of, but for a detail."""
  objects, place = list(scene.objects), rng.integers(len(scene.objects))
  change = ("colour", "shape", "order")[rng.integers(3)]
  kinds = [(thing.colour, thing.shape) for thing in objects]
  if change == "order" and len(set(kinds)) > 1:
    # Turned by one: of two, each in the place of the other.
    kinds = kinds[1:] + kinds[:1]
  else:
    change = "colour" if change == "order" else change
    values = [*(COLOURS if change == "colour" else SHAPES)]
    colour, shape = kinds[place]
    values.remove(colour if change == "colour" else shape)
    value = values[rng.integers(len(values))]
    kinds[place] = (value, shape) if change == "colour" else (colour, value)
  return dataclasses.replace(
    scene,
    objects=tuple(
      dataclasses.replace(thing, colour=colour, shape=shape)
      for thing, (colour, shape) in zip(objects, kinds, strict=True)
    ),
  )


def _say_little(scene: Scene, rng: np.random.Generator) -> str:
  """A text that is no description: one object of all, or none."""
  if rng.random() < 0.5:
    return phrase(scene.objects[rng.integers(len(scene.objects))], False)
  return _VAGUE[rng.integers(len(_VAGUE))]
