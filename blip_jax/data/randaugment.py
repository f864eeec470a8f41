"""RandAugment as in BLIP: OpenCV arithmetic on uint8 RGB arrays.

`RandAugment` samples a few operations and applies them. `OPS` has every
operation; BLIP samples from ten of them (`BLIP_OPS`). Each equals the original
bit for bit, bugs included, because the published models were trained with it.

At BLIP's magnitude, 5 of 10, Identity, Brightness and Sharpness do not change
the image, so seven operations are active.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from jaxtyping import Float, Int16, UInt8, UInt16

MAX_MAGNITUDE = 10
# Pixels that a warp takes from outside the image are grey.
FILL = (128, 128, 128)

Image = UInt8[np.ndarray, "H W 3"]

# The original passes RGB where BGR is expected, so red and blue swap weights.
_LUMA = np.array([0.114, 0.587, 0.299])


def identity(image: Image) -> Image:
  return image


def auto_contrast(image: Image) -> Image:
  """Stretches each channel to the full range, or makes it white.

  The original negates the minimum in 8 bits, which wraps around: a channel
  whose minimum is above 0 becomes white everywhere. This is kept.
  """
  tables = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
  for c in range(3):
    low, high = int(image[..., c].min()), int(image[..., c].max())
    if 0 < low < high:
      tables[c] = 255
    elif low < high:
      tables[c] = (np.arange(256) * (255 / high)).clip(0, 255)
  return _look_up(image, tables)


def equalize(image: Image) -> Image:
  """Equalises the histogram of each channel, with PIL's rounding."""
  tables = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
  for c in range(3):
    counts = cv2.calcHist([image], [c], None, [256], [0, 256])
    counts = counts.ravel().astype(np.int64)
    step = counts[counts > 0][:-1].sum() // 255
    if step > 0:
      below = np.cumsum(np.concatenate([[step // 2], counts[:-1]]))
      tables[c] = (below // step).clip(0, 255)
  return _look_up(image, tables)


def solarize(image: Image, threshold: float) -> Image:
  return np.where(image < threshold, image, 255 - image)


def posterize(image: Image, bits: float) -> Image:
  """Keeps the upper bits of each value; 0 bits give a black image."""
  return image & np.uint8(0xFF & (0xFF << (8 - int(bits))))


def color(image: Image, factor: float) -> Image:
  """Blends with the grey image (factor 0); factor 1 is the image itself."""
  # In float32 and with one matrix, as in the original: the result is
  # truncated, so the last bit of every sum matters.
  luma = _LUMA.astype(np.float32)[:, None]
  away = np.eye(3, dtype=np.float32) - luma
  blend = away * np.float32(factor) + luma
  return np.matmul(image, blend).clip(0, 255).astype(np.uint8)


def contrast(image: Image, factor: float) -> Image:
  """Blends with the mean grey value (factor 0); factor 1 is the image."""
  mean = np.sum(image.mean(axis=(0, 1)) * _LUMA)
  table = ((np.arange(256) - mean) * factor + mean).clip(0, 255)
  return cv2.LUT(image, table.astype(np.uint8))


def brightness(image: Image, factor: float) -> Image:
  """Blends with black (factor 0); factor 1 is the image itself."""
  table = (np.arange(256, dtype=np.float32) * np.float32(factor)).clip(0, 255)
  return cv2.LUT(image, table.astype(np.uint8))


def sharpness(image: Image, factor: float) -> Image:
  """Blends with a smoothed image (factor 0), except for the border pixels."""
  if factor == 1:
    return image
  kernel = np.ones((3, 3), np.float32)
  kernel[1, 1] = 5
  smooth = cv2.filter2D(image, -1, kernel / 13).astype(np.float32)
  out = image.astype(np.float32)
  inner = np.s_[1:-1, 1:-1]
  out[inner] = smooth[inner] + np.float32(factor) * (out[inner] - smooth[inner])
  # The original does not clip, so values out of range wrap around. The cast
  # goes through int32 because a direct one differs between processors.
  return out.astype(np.int32).astype(np.uint8)


def shear_x(image: Image, factor: float) -> Image:
  return _warp(image, _affine([1, factor, 0], [0, 1, 0]))


def shear_y(image: Image, factor: float) -> Image:
  return _warp(image, _affine([1, 0, 0], [factor, 1, 0]))


def translate_x(image: Image, pixels: float) -> Image:
  return _warp(image, _affine([1, 0, -pixels], [0, 1, 0]))


def translate_y(image: Image, pixels: float) -> Image:
  return _warp(image, _affine([1, 0, 0], [0, 1, -pixels]))


def rotate(image: Image, degrees: float) -> Image:
  height, width = image.shape[:2]
  center = (width / 2, height / 2)
  return _warp(image, cv2.getRotationMatrix2D(center, degrees, 1))


def _affine(
  x: Sequence[float | int], y: Sequence[float | int]
) -> Float[np.ndarray, "2 3"]:
  # Rounded to float32, as in the original.
  return np.array([x, y], np.float32)


def _look_up(image: Image, tables: UInt8[np.ndarray, "3 256"]) -> Image:
  return cv2.LUT(image, np.ascontiguousarray(tables.T)[None])


def _warp(image: Image, matrix: Float[np.ndarray, "2 3"]) -> Image:
  """Warps bilinearly; `matrix` maps input (x, y, 1) to output (x, y).

  `cv2.remap` is used because `cv2.warpAffine` has different rounding since
  OpenCV 5; results differ by several grey levels.
  """
  inverse = cv2.invertAffineTransform(matrix.astype(np.float64))
  height, width = image.shape[:2]
  pixels, fractions = _warp_maps(tuple(inverse.ravel()), height, width)
  return cv2.remap(
    image,
    pixels,
    fractions,
    cv2.INTER_LINEAR,
    borderMode=cv2.BORDER_CONSTANT,
    borderValue=FILL,
  )


# A run has one image size and ten warps, and computing the maps takes longer
# than applying them.
@functools.lru_cache(maxsize=16)
def _warp_maps(
  inverse: tuple[float, ...], height: int, width: int
) -> tuple[Int16[np.ndarray, "H W 2"], UInt16[np.ndarray, "H W"]]:
  """Returns where `cv2.remap` reads each pixel: integer and fractional part.

  The fractional parts of y and x are in 1/32 pixel, 5 bits each. The rounding
  is that of `cv2.warpAffine` in OpenCV 4: products have 10 fractional bits,
  and their sum has 5.

  Args:
    inverse: affine map from output to input, [2, 3] flattened.
    height: of the image.
    width: of the image.
  """
  x, y = np.arange(width), np.arange(height)[:, None]

  def source(from_x: float, from_y: float, shift: float):
    along = np.rint(from_x * x * 1024).astype(np.int32)
    across = np.rint((from_y * y + shift) * 1024).astype(np.int32)
    return (along + across + 16) >> 5

  x_source, y_source = source(*inverse[:3]), source(*inverse[3:])
  pixels = np.stack([x_source >> 5, y_source >> 5], axis=-1)
  fractions = (y_source & 31) * 32 + (x_source & 31)
  return pixels.astype(np.int16), fractions.astype(np.uint16)


def _no_strength(magnitude: int) -> tuple[()]:
  return ()


def _enhance(magnitude: int) -> tuple[float]:
  """From 0.1 to 1.9, where 1 changes nothing."""
  return (magnitude / MAX_MAGNITUDE * 1.8 + 0.1,)


def _shear(magnitude: int) -> tuple[float]:
  return (magnitude / MAX_MAGNITUDE * 0.3,)


def _translate(magnitude: int) -> tuple[float]:
  """Up to 10 pixels, whatever the size of the image."""
  return (magnitude / MAX_MAGNITUDE * 10.0,)


def _rotate(magnitude: int) -> tuple[float]:
  return (magnitude / MAX_MAGNITUDE * 30,)


def _solarize(magnitude: int) -> tuple[float]:
  return (float(int(magnitude / MAX_MAGNITUDE * 256)),)


def _posterize(magnitude: int) -> tuple[float]:
  return (float(int(magnitude / MAX_MAGNITUDE * 4)),)


@dataclasses.dataclass(frozen=True)
class Op:
  """An operation: what it does and how strongly.

  Attributes:
    apply: from an image and the strength, if there is one, to an image.
    strength: from a magnitude in 0..10 to the further arguments of `apply`.
    signed: whether the strength is negated with probability 1/2.
  """

  apply: Callable[..., Image]
  strength: Callable[[int], tuple[float, ...]]
  signed: bool = False


OPS = {
  "Identity": Op(identity, _no_strength),
  "AutoContrast": Op(auto_contrast, _no_strength),
  "Equalize": Op(equalize, _no_strength),
  "Brightness": Op(brightness, _enhance),
  "Sharpness": Op(sharpness, _enhance),
  "Color": Op(color, _enhance),
  "Contrast": Op(contrast, _enhance),
  "Solarize": Op(solarize, _solarize),
  "Posterize": Op(posterize, _posterize),
  "ShearX": Op(shear_x, _shear, signed=True),
  "ShearY": Op(shear_y, _shear, signed=True),
  "TranslateX": Op(translate_x, _translate, signed=True),
  "TranslateY": Op(translate_y, _translate, signed=True),
  "Rotate": Op(rotate, _rotate, signed=True),
}

BLIP_OPS = (
  "Identity",
  "AutoContrast",
  "Brightness",
  "Sharpness",
  "Equalize",
  "ShearX",
  "ShearY",
  "TranslateX",
  "TranslateY",
  "Rotate",
)


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """Applies a few randomly sampled operations, one after the other.

  Attributes:
    num_ops: operations sampled per image, with replacement.
    magnitude: strength of all operations, from 0 to 10.
    prob: probability with which a sampled operation is applied.
    ops: names in `OPS` of the operations to sample from.
  """

  num_ops: int = 2
  magnitude: int = 5
  prob: float = 0.5
  ops: tuple[str, ...] = BLIP_OPS

  def __post_init__(self):
    unknown = sorted(set(self.ops) - set(OPS))
    if unknown or not self.ops:
      raise ValueError(
        f"RandAugment.ops: expected some of {sorted(OPS)}, found {unknown}"
      )
    if not 0 <= self.magnitude <= MAX_MAGNITUDE:
      raise ValueError(
        f"RandAugment.magnitude: expected 0 to {MAX_MAGNITUDE}, found "
        f"{self.magnitude}"
      )
    if not 0 <= self.prob <= 1:
      raise ValueError(
        f"RandAugment.prob: expected a probability, found {self.prob}"
      )

  def sample(
    self, rng: np.random.Generator
  ) -> list[tuple[str, tuple[float, ...]]]:
    """Returns the operations to apply, in order, as (name, arguments)."""
    sampled = []
    for _ in range(self.num_ops):
      name = self.ops[rng.integers(len(self.ops))]
      applied, negated = rng.random() < self.prob, rng.random() < 0.5
      strength = OPS[name].strength(self.magnitude)
      if OPS[name].signed and negated:
        strength = tuple(-value for value in strength)
      if applied:
        sampled.append((name, strength))
    return sampled

  def __call__(self, image: Image, rng: np.random.Generator) -> Image:
    for name, strength in self.sample(rng):
      image = OPS[name].apply(image, *strength)
    return image
