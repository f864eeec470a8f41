"""Noise captions: texts that do not describe their image, as in web data."""

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
# Kinds of junk; repetitions set how often each occurs. "plain" is easy to
# recognise. "web" is like web data, where most junk is almost correct.
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


def generate(kind: str, scene: Scene, rng: np.random.Generator) -> str:
  """Returns junk of any kind but "swap", which needs other scenes."""
  if kind == "near_miss":
    return describe(_changed(scene, rng), rng)
  if kind == "vague":
    return _vague(scene, rng)
  phrases = _BOILERPLATE if kind == "boilerplate" else _FILE_NAMES
  template = phrases[rng.integers(len(phrases))]
  return template.format(*rng.integers(1, 10_000, 2))


def _changed(scene: Scene, rng: np.random.Generator) -> Scene:
  """Returns the scene with one detail changed: a colour, a shape or the order.

  The two scenes have no description in common.
  """
  objects, index = list(scene.objects), rng.integers(len(scene.objects))
  change = ("colour", "shape", "order")[rng.integers(3)]
  kinds = [(item.colour, item.shape) for item in objects]
  if change == "order" and len(set(kinds)) > 1:
    # Rotated by one; two objects swap positions.
    kinds = kinds[1:] + kinds[:1]
  else:
    change = "colour" if change == "order" else change
    values = [*(COLOURS if change == "colour" else SHAPES)]
    colour, shape = kinds[index]
    values.remove(colour if change == "colour" else shape)
    value = values[rng.integers(len(values))]
    kinds[index] = (value, shape) if change == "colour" else (colour, value)
  return dataclasses.replace(
    scene,
    objects=tuple(
      dataclasses.replace(item, colour=colour, shape=shape)
      for item, (colour, shape) in zip(objects, kinds, strict=True)
    ),
  )


def _vague(scene: Scene, rng: np.random.Generator) -> str:
  """Returns a text that names one object without its position, or none."""
  if rng.random() < 0.5:
    return phrase(scene.objects[rng.integers(len(scene.objects))], False)
  return _VAGUE[rng.integers(len(_VAGUE))]
