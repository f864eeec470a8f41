"""From the stored image and text of a record to the model's input.

Images stay uint8, a quarter of the bytes to move; they are normalised on the
device. PIL decodes and resizes, because the published models were trained and
evaluated with it; OpenCV's bicubic filter does not antialias.
"""

import dataclasses
import io
import math
import os
import re
from typing import BinaryIO

import numpy as np
import PIL.features
import PIL.Image
from jaxtyping import UInt8

from blip_jax.data import randaugment
from blip_jax.runtime import files

# PIL reads more formats, but some run an external program (EPS: Ghostscript),
# which is unsafe for files from the web.
_FORMATS = (
  *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"),
  *(["AVIF"] if "avif" in PIL.features.get_supported() else []),
)
# File name extensions of these formats.
ENDINGS = (
  *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
  *(".ppm", ".pgm", ".jp2"),
  *(".jfif", ".jpe", ".apng", ".avif", ".pbm", ".pnm"),
  *(".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
)
# PIL's modes for grey images of more than 8 bits.
_DEEP_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N")

# Larger images are attacks or scans, and would take gigabytes in every worker.
MAX_PIXELS = 80_000_000
MAX_TEXT_BYTES = 100_000
# C0, DEL and C1, without tabs and line ends, which separate words.
_CONTROLS = dict.fromkeys(
  c for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\t\n\r"
)
# Removed from captions and questions, as in BLIP.
_PUNCTUATION = '.!"()*#:;~'
_TO_SPACE = str.maketrans(dict.fromkeys(_PUNCTUATION, " "))
_TO_NOTHING = str.maketrans("", "", _PUNCTUATION)

Image = UInt8[np.ndarray, "H W 3"]
Resized = UInt8[np.ndarray, "h w 3"]
# Square, or (height, width).
Size = int | tuple[int, int]


class BadSample(Exception):
  """A sample that cannot be used; the loader counts and skips it.

  Attributes:
    reason: a short code, by which samples are counted. Images: missing,
      unreadable, empty, not_an_image, too_large, truncated, corrupt,
      bad_array, unknown_range. Texts: invalid_utf8, empty_caption, too_long.
    detail: what exactly is wrong, for the report, in one line.
  """

  def __init__(self, reason: str, detail: str):
    # `Exception` gets both arguments so that the error can be pickled, to be
    # passed between processes.
    detail = files.one_line(detail)
    super().__init__(reason, detail)
    self.reason = reason
    self.detail = detail

  def __str__(self) -> str:
    return f"{self.reason}: {self.detail}"


def decode(
  image: bytes | str | os.PathLike | np.ndarray | PIL.Image.Image,
  max_pixels: int,
) -> Image:
  """Returns an image as RGB, uint8 [H, W, 3].

  An image has the same pixels however it is given. As in the original,
  transparency is dropped, an animation gives its first frame, and the EXIF
  orientation is ignored. 16-bit grey keeps its upper 8 bits, as 16-bit colour
  does; the original clips it at 255. Floats are values from 0 to 255.

  Args:
    image: the encoded bytes, the path of a file, a PIL image, or uint8 pixels
      [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
    max_pixels: larger images are refused. The header is checked before any
      pixel is decoded: a file of some hundred bytes may claim gigabytes.

  Raises:
    BadSample: the image cannot be used.
  """
  if isinstance(image, np.ndarray):
    image = _from_array(image)
  if isinstance(image, PIL.Image.Image):
    return _converted(image, max_pixels)
  name = "bytes" if isinstance(image, bytes) else os.fspath(image)
  try:
    stream = _open(image)
  except FileNotFoundError as error:
    raise BadSample("missing", name) from error
  except (OSError, ValueError) as error:
    raise BadSample("unreadable", f"{name}: {error}") from error
  with stream:
    return _read(stream, max_pixels)


def _open(image: bytes | str | os.PathLike) -> io.BytesIO | BinaryIO:
  if isinstance(image, bytes):
    return io.BytesIO(image)
  return files.open_read(image)


def _read(stream: io.BytesIO | BinaryIO, max_pixels: int) -> Image:
  try:
    if not stream.read(1):
      raise BadSample("empty", "zero bytes")
    stream.seek(0)
    opened = PIL.Image.open(stream, formats=_FORMATS)
  except BadSample:
    raise
  except PIL.UnidentifiedImageError as error:
    stream.seek(0)
    detail = f"begins with {stream.read(16)!r}"
    raise BadSample("not_an_image", detail) from error
  except Exception as error:
    raise _damaged(error) from error
  return _converted(opened, max_pixels)


def _converted(image: PIL.Image.Image, max_pixels: int) -> Image:
  try:
    return _to_rgb(image, max_pixels)
  except BadSample:
    raise
  except Exception as error:
    raise _damaged(error) from error


def _damaged(error: Exception) -> BadSample:
  """PIL's readers raise almost any exception on damaged files."""
  if isinstance(error, PIL.Image.DecompressionBombError):
    return BadSample("too_large", str(error))
  reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
  return BadSample(reason, f"{type(error).__name__}: {error}")


def _from_array(image: np.ndarray) -> PIL.Image.Image:
  grey = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1)
  if image.dtype != np.uint8 or not (
    grey or (image.ndim == 3 and image.shape[2] in (3, 4))
  ):
    detail = (
      "expected uint8 pixels from 0 to 255, [H, W], [H, W, 1], [H, W, 3] or "
      f"[H, W, 4], found {image.dtype} {image.shape}; convert them first: "
      "(255 * x).round().astype('uint8') of floats from 0 to 1, or "
      "(x >> 8).astype('uint8') of 16 bits"
    )
    raise BadSample("bad_array", detail)
  if image.size == 0:
    raise BadSample("empty", f"an array of shape {image.shape}")
  return PIL.Image.fromarray(image.reshape(image.shape[:2]) if grey else image)


def _to_rgb(image: PIL.Image.Image, max_pixels: int) -> Image:
  width, height = image.size
  if width * height > max_pixels:
    detail = f"{width} x {height} pixels; at most {max_pixels} are allowed"
    raise BadSample("too_large", detail)
  if not width * height:
    raise BadSample("empty", f"{width} x {height} pixels")
  if image.mode in _DEEP_GREY:
    deep = np.asarray(image)
    _check_range(deep, 0, 0xFFFF)
    image = PIL.Image.fromarray((deep >> 8).astype(np.uint8))
  if image.mode == "F":
    # Bicubic filters overshoot a little.
    _check_range(np.asarray(image), -1, 256)
  if "transparency" in image.info:
    # It does not change the colours, but PIL would warn about each such
    # palette. The image may be the user's.
    image = image.copy()
    image.info.pop("transparency", None)
  return np.array(image.convert("RGB"))


def _check_range(pixels: np.ndarray, low: int, high: int) -> None:
  """Refuses numbers that may mean anything: they would turn black or white."""
  least, most = pixels.min(), pixels.max()
  is_unit = pixels.dtype.kind == "f" and 0 < most <= 1
  if not (low <= least and most <= high) or is_unit:  # also NaN
    expected = "0 to 255" if pixels.dtype.kind == "f" else "0 to 65535"
    raise BadSample(
      "unknown_range",
      f"expected {pixels.dtype} pixels from {expected}, found {least} to "
      f"{most}; save the image with 8 bits",
    )


def resized_crop(
  image: Image,
  top: int,
  left: int,
  height: int,
  width: int,
  size: Size,
  flip: bool,
) -> Resized:
  """Crops a box, resizes it to `size` (bicubic, antialiased), and flips it.

  Args:
    image: what the box is cut from.
    top: first row of the box, in pixels.
    left: first column of the box.
    height: of the box.
    width: of the box.
    size: of the result, square or (height, width).
    flip: whether to flip the result horizontally.
  """
  crop = image[top : top + height, left : left + width]
  resized = _resize(crop, size)
  return np.ascontiguousarray(resized[:, ::-1]) if flip else resized


def _resize(image: Image, size: Size) -> Resized:
  height, width = (size, size) if isinstance(size, int) else size
  pixels = PIL.Image.fromarray(np.ascontiguousarray(image))
  return np.array(pixels.resize((width, height), PIL.Image.Resampling.BICUBIC))


def sample_crop(
  height: int,
  width: int,
  scale: tuple[float, float],
  ratio: tuple[float, float],
  rng: np.random.Generator,
) -> tuple[int, int, int, int]:
  """Samples a box (top, left, height, width) as torchvision's crop does.

  The area is a share of the image, uniform in `scale`; width / height is
  log-uniform in `ratio`. If ten sampled boxes do not fit into the image, the
  result is the largest centred box with the allowed ratio that is nearest to
  the image's own, whatever its area.
  """
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
    if 0 < w <= width and 0 < h <= height:
      top = int(rng.integers(height - h + 1))
      left = int(rng.integers(width - w + 1))
      return top, left, h, w
  h, w = height, width
  if width / height < ratio[0]:
    h = round(width / ratio[0])
  elif width / height > ratio[1]:
    w = round(height * ratio[1])
  return (height - h) // 2, (width - w) // 2, h, w


@dataclasses.dataclass(frozen=True)
class TrainImage:
  """Random crop to a fixed size, random horizontal flip and RandAugment.

  Attributes:
    size: of the result, square or (height, width).
    min_scale: smallest area of a crop, as a share of the image. BLIP
      pre-trains with 0.2 and fine-tunes with 0.5.
    randaugment: None applies none.
    ratio: range of width / height of a crop.
  """

  size: Size
  min_scale: float
  randaugment: randaugment.RandAugment | None
  ratio: tuple[float, float] = (3 / 4, 4 / 3)

  def __post_init__(self):
    if not 0 < self.min_scale <= 1:
      raise ValueError(
        "TrainImage.min_scale (config.data.min_scale): expected a share in "
        f"(0, 1], found {self.min_scale}"
      )

  def __call__(self, image: Image, rng: np.random.Generator) -> Resized:
    scale = (self.min_scale, 1.0)
    height, width = image.shape[:2]
    box = sample_crop(height, width, scale, self.ratio, rng)
    flip = bool(rng.random() < 0.5)
    image = resized_crop(image, *box, size=self.size, flip=flip)
    if self.randaugment is not None:
      image = self.randaugment(image, rng)
    return image


@dataclasses.dataclass(frozen=True)
class EvalImage:
  """Resizing to a fixed size, without keeping the aspect ratio.

  Attributes:
    size: of the result, square or (height, width).
  """

  size: Size

  def __call__(self, image: Image) -> Resized:
    return _resize(image, self.size)


def clean_text(text: str | bytes) -> str:
  """Returns a text without control characters (tabs and line ends stay).

  Raises:
    BadSample: the text is not UTF-8, is longer than `MAX_TEXT_BYTES`, or has
      only white space and the punctuation that `pre_caption` removes ("...").
  """
  try:
    # A str can fail too: JSON can contain half of a surrogate pair.
    raw = text.encode() if isinstance(text, str) else text
    if len(raw) > MAX_TEXT_BYTES:
      detail = (
        f"{len(raw)} bytes; at most {MAX_TEXT_BYTES} are allowed: "
        f"{raw[:60]!r}..."
      )
      raise BadSample("too_long", detail)
    text = raw.decode()
  except UnicodeError as error:
    raise BadSample("invalid_utf8", f"{text[:60]!r}: {error}") from error
  cleaned = text.translate(_CONTROLS)
  if not cleaned.translate(_TO_NOTHING).strip():
    raise BadSample("empty_caption", repr(text[:60]))
  return cleaned


def pre_caption(text: str, max_words: int) -> str:
  """Normalises a caption as BLIP does.

  The result is in lower case; each of `.!"()*#:;~` becomes a space; runs of
  white space become one space; the first `max_words` words, separated by
  single spaces, are kept.
  """
  text = re.sub(r"\s{2,}", " ", text.lower().translate(_TO_SPACE))
  return _first_words(text.rstrip("\n").strip(" "), max_words)


def pre_question(text: str, max_words: int = 50) -> str:
  """Normalises a question as BLIP does.

  The result is in lower case; each of `.!"()*#:;~` is deleted without leaving
  a space; spaces at the end are removed; the first `max_words` words are kept.
  """
  text = text.lower().translate(_TO_NOTHING)
  return _first_words(text.rstrip(" "), max_words)


def _first_words(text: str, max_words: int) -> str:
  return " ".join(text.split(" ")[:max_words])
