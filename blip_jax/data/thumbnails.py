"""Small images for people to look at, on contact sheets and pages."""

import math
from collections.abc import Callable

import numpy as np
import PIL.Image
from absl import logging

from blip_jax.data import rejects, transforms
from blip_jax.data.transforms import Image, Resized
from blip_jax.runtime import files

Resampling = PIL.Image.Resampling


def read(
  get_image: Callable[[], object], side: int, name: str
) -> Resized | None:
  """A thumbnail of an image, or None, with a warning, if it cannot be read.

  What is shown was read before. If it is gone by now, only its thumbnail is
  missing.

  Args:
    get_image: returns the image as `transforms.decoded` takes it.
    side: of the thumbnail; see `fit`.
    name: of the image, for the warning.
  """
  try:
    with transforms.decoded(get_image(), transforms.MAX_PIXELS) as pixels:
      return fit(pixels, side)
  except Exception as error:
    if rejects.hits_all(error):
      raise
    shown = files.one_line(f"{name}: {error}")
    logging.warning("An image cannot be shown: %s", shown)
    return None


def fit(image: Image, side: int) -> Resized:
  """Scales an image until its longer side is `side`.

  Images of at most half of it are enlarged by a whole factor instead, so that
  one sees the pixels that a model sees.
  """
  height, width, _ = image.shape
  factor = side / max(height, width)
  resample = Resampling.LANCZOS
  if factor >= 2:
    factor, resample = math.floor(factor), Resampling.NEAREST
  size = (max(1, round(width * factor)), max(1, round(height * factor)))
  return np.array(PIL.Image.fromarray(image).resize(size, resample))
