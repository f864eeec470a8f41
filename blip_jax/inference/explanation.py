"""What `Model.explain` returns: a map of the image for each word, to look at.

Dimensions: n words, h and w patches vertically and horizontally, R and S rows
and columns of an overlay.
"""

import dataclasses
import io
import os
from typing import Any

import cv2
import numpy as np
import PIL.Image
from jaxtyping import Float, UInt8

from blip_jax.data import thumbnails, transforms
from blip_jax.runtime import contact_sheet, files

# Side of an overlay in pixels, and the share of colour where a map has its
# maximum.
SIDE = 384
OPACITY = 0.65


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Explanation:
  """Which patches of an image each word of a text rests on.

  Attributes:
    words: of the text as the model read it; pieces such as "play" and "##ing"
      are joined.
    maps: for each word, how much each patch speaks for it, 0 or more. The scale
      differs between models and layers, so compare patches, not images.
    whole: the same for the text as a whole: what decides whether it matches, or
      the mean of the words of a caption.
    pixels: the image as the model saw it.
  """

  words: tuple[str, ...]
  maps: Float[np.ndarray, "n h w"]
  whole: Float[np.ndarray, "h w"]
  pixels: UInt8[np.ndarray, "H W 3"]

  def __repr__(self) -> str:
    return f"Explanation({' '.join(self.words)!r}, maps={[*self.maps.shape]})"

  def map(self, words: str | None = None) -> Float[np.ndarray, "h w"]:
    """The mean map of some words, or that of the whole text.

    Args:
      words: one or several that follow one another, such as "red circle";
        wherever they occur. By default the whole text.

    Raises:
      ValueError: the text has no such words; says which it has.
    """
    if words is None:
      return self.whole
    asked = tuple(words.lower().split())
    size = len(asked)
    # Names of special tokens are in upper case; a model may generate them.
    own = tuple(word.lower() for word in self.words)
    starts = [
      start
      for start in range(len(self.words) - size + 1)
      if size and own[start : start + size] == asked
    ]
    if not starts:
      raise ValueError(
        f"words: expected some of {' '.join(self.words)!r}, found "
        f"{words[:200]!r}"
      )
    return np.mean([self.maps[s : s + size] for s in starts], axis=(0, 1))

  def overlay(
    self, words: str | None = None, image: Any = None, side: int = SIDE
  ) -> UInt8[np.ndarray, "R S 3"]:
    """The image, coloured where the words rest on it: from clear to red.

    Args:
      words: as for `map`.
      image: what to draw on, as `blip_jax.Image`; by default what the model
        saw, which is a square.
      side: of the result in pixels, about; the longer one.

    Raises:
      ValueError: the text has no such words, or the image cannot be read.
    """
    shown = self.pixels if image is None else _decoded(image)
    shown = thumbnails.fit(shown, side)
    heat = self.map(words)
    heat = heat / max(float(heat.max()), np.finfo(np.float32).tiny)
    size = shown.shape[1], shown.shape[0]
    heat = cv2.resize(heat, size, interpolation=cv2.INTER_CUBIC).clip(0, 1)
    colour = cv2.applyColorMap(
      np.rint(heat * 255).astype(np.uint8), cv2.COLORMAP_JET
    )[..., ::-1]
    share = OPACITY * heat[..., None]
    return np.rint(shown * (1 - share) + colour * share).astype(np.uint8)

  def save(
    self,
    path: str | os.PathLike,
    words: str | None = None,
    image: Any = None,
  ) -> None:
    """Writes a PNG: the overlay of some words, or by default a sheet of all.

    Args:
      path: of the PNG, which appears complete or not at all.
      words: as for `map`.
      image: as for `overlay`.

    Raises:
      ValueError: as `overlay`.
    """
    if words is not None:
      files.make_folder(files.as_path(path).parent)
      content = io.BytesIO()
      PIL.Image.fromarray(self.overlay(words, image)).save(content, "PNG")
      files.write_bytes(path, content.getvalue())
      return
    named = [("the whole text", " ".join(self.words), None)]
    named += [("word", word, word) for word in dict.fromkeys(self.words)]
    cells = [
      contact_sheet.Cell(
        self.overlay(word, image, contact_sheet.IMAGE),
        (contact_sheet.Line(label, text),),
      )
      for label, text, word in named
    ]
    contact_sheet.contact_sheet(cells, path)


def _decoded(image: Any) -> transforms.Image:
  try:
    with transforms.decoded(image, transforms.MAX_PIXELS) as pixels:
      return pixels
  except transforms.BadSample as error:
    raise ValueError(f"image: {error}") from error
