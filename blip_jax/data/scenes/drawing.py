"""The content of a scene, and its image."""

import dataclasses
import math

import cv2
import numpy as np
from jaxtyping import UInt8

COLOURS = {
  "red": (214, 32, 38),
  "orange": (245, 134, 16),
  "yellow": (247, 220, 40),
  "green": (38, 150, 62),
  "cyan": (48, 205, 220),
  "blue": (36, 74, 204),
  "purple": (132, 46, 168),
  "pink": (246, 140, 190),
  "brown": (122, 74, 38),
  "black": (28, 28, 32),
}


def _star(corners: int, inner: float = 1.0) -> np.ndarray:
  """Returns a polygon with a corner at the top.

  Every second corner has radius `inner`, the others radius 1.
  """
  angle = np.arange(corners) * (2 * math.pi / corners) - math.pi / 2
  radius = np.where(np.arange(corners) % 2, inner, 1.0)
  return np.stack([np.cos(angle), np.sin(angle)], -1) * radius[:, None]


def _cross(arm: float) -> np.ndarray:
  corner = np.array([(arm, -1), (arm, -arm), (1, -arm)])
  turn = np.array([(0, 1), (-1, 0)])
  turns = [np.linalg.matrix_power(turn, k) for k in range(4)]
  return np.concatenate([corner @ turn for turn in turns])


def _heart() -> np.ndarray:
  t = np.linspace(0, 2 * math.pi, 64, endpoint=False)
  x = 16 * np.sin(t) ** 3
  y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
  return np.stack([x, -y - 2.5], -1) / 15


# Contours around (0, 0), y downwards, scaled to look similar in size. A second
# contour is a hole.
SHAPES = {
  "circle": (_star(64),),
  "square": (np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.88,),
  "triangle": (np.array([(0, -1), (1.1, 0.9), (-1.1, 0.9)]),),
  "diamond": (_star(4) * (0.85, 1.15),),
  "cross": (_cross(0.36),),
  "star": (_star(10, 0.45) * 1.15 + (0, 0.1),),
  "heart": (_heart(),),
  "ring": (_star(64), _star(64) * 0.52),
}

KINDS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)

# Centres of the objects in reading order, in fractions of the side.
_NEAR, _MID, _FAR = 0.25, 0.5, 0.75
LAYOUTS = {
  1: {
    "middle": ((_MID, _MID),),
    "left": ((_NEAR, _MID),),
    "right": ((_FAR, _MID),),
    "top": ((_MID, _NEAR),),
    "bottom": ((_MID, _FAR),),
  },
  2: {
    "row": ((_NEAR, _MID), (_FAR, _MID)),
    "column": ((_MID, _NEAR), (_MID, _FAR)),
  },
  3: {
    "row": ((0.18, _MID), (_MID, _MID), (0.82, _MID)),
    "column": ((_MID, 0.18), (_MID, _MID), (_MID, 0.82)),
  },
}
# Radius of a large object in fractions of the side, by the number of objects.
RADIUS = {1: 0.21, 2: 0.21, 3: 0.135}
# Radius of a small object, in radii of a large one.
SMALL = 0.68
# Largest shift of a centre, in fractions of the side.
JITTER = 0.025
# Share of pairs with one small and one large object.
SIZES_DIFFER = 0.1


@dataclasses.dataclass(frozen=True)
class Object:
  """One shape in a scene.

  Attributes:
    shape: a key of `SHAPES`.
    colour: a key of `COLOURS`.
    size: "small" or "large".
    x: of the centre, in fractions of the side, to the right.
    y: of the centre, in fractions of the side, downwards.
  """

  shape: str
  colour: str
  size: str
  x: float
  y: float


@dataclasses.dataclass(frozen=True)
class Scene:
  """The content of an image.

  Attributes:
    objects: one to three, in reading order.
    layout: a key of `LAYOUTS[len(objects)]`.
    grain: seed of everything that captions do not mention: the tone of the
      paper, speckle and slight tints.
  """

  objects: tuple[Object, ...]
  layout: str
  grain: int

  @property
  def sizes_differ(self) -> bool:
    """Whether captions can name sizes, which are relative."""
    return len({item.size for item in self.objects}) > 1


def render(scene: Scene, size: int) -> UInt8[np.ndarray, "S S 3"]:
  """Returns the image of `scene`, RGB and antialiased, [size, size, 3]."""
  rng = np.random.default_rng(scene.grain)
  paper = rng.integers(214, 240) + rng.integers(-5, 6, 3)
  tints = rng.integers(-8, 9, (len(scene.objects), 3))
  # Drawn at a larger size, because OpenCV's antialiasing enlarges shapes by
  # about a pixel, which at 32 pixels closes rings and rounds corners.
  factor = max(1, 128 // size)
  side = size * factor
  image = np.full((side, side, 3), paper, np.uint8)
  for item, tint in zip(scene.objects, tints, strict=True):
    scale = RADIUS[len(scene.objects)] * (SMALL if item.size == "small" else 1)
    # In OpenCV, the centres of pixels have integer coordinates. These have 4
    # fractional bits.
    contours = [
      np.rint(((c * scale + (item.x, item.y)) * side - 0.5) * 16).astype(
        np.int32
      )
      for c in SHAPES[item.shape]
    ]
    rgb = (COLOURS[item.colour] + tint).clip(0, 255).tolist()
    cv2.fillPoly(image, contours, rgb, cv2.LINE_AA, shift=4)
  image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
  speckle = rng.integers(-4, 5, image.shape, dtype=np.int8)
  return (image + speckle.astype(np.int16)).clip(0, 255).astype(np.uint8)
