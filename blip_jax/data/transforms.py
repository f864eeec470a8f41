"""From the stored image and text of a record to the model's input.

Images stay uint8, a quarter of the bytes to move; they are normalised on the
device. PIL decodes and resizes, because the published models were trained and
evaluated with it; OpenCV's bicubic filter does not antialias.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator

import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageFile
from jaxtyping import Int, UInt8

from blip_jax.data import image_headers, image_limits, randaugment, rgb
from blip_jax.data.rejects import BadSample
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

# Larger images are attacks or scans.
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


@contextlib.contextmanager
def decoded(image: object, max_pixels: int) -> Iterator[Image]:
  """An image as RGB, uint8 [H, W, 3], for what is made of it in the block.

  Until the end of the block, other threads leave the memory that it takes. The
  block must not decode further images.

  An image has the same pixels however it is given. As in the original,
  transparency is dropped, an animation gives its first frame, and the EXIF
  orientation is ignored. 16-bit grey keeps its upper 8 bits, as 16-bit colour
  does; the original clips it at 255. Floats are values from 0 to 255.

  Args:
    image: the encoded bytes, the path of a file, a PIL image, or uint8 pixels
      [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]; anything else is refused.
    max_pixels: larger images are refused, as are those beyond `image_limits`.
      Headers are checked before any pixel is decoded: a file of some hundred
      bytes may claim gigabytes.

  Raises:
    BadSample: the image cannot be used.
  """
  with _with_memory(image, max_pixels) as opened:
    pixels = rgb.pixels(opened)
    del opened  # which has a copy of its own
    yield pixels


def resized(
  image: object,
  sizes: Iterable["EvalImage"],
  max_pixels: int,
  scaled: bool = False,
) -> list[Resized]:
  """Decodes an image and resizes it to each of some sizes.

  Equal to what `EvalImage` makes of `decoded`, and faster.

  Args:
    image: as for `decoded`.
    sizes: of the results.
    max_pixels: as for `decoded`.
    scaled: whether a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, if it is
      still no smaller than the sizes then. That is faster, and gives other
      pixels.

  Raises:
    BadSample: the image cannot be used.
  """
  shapes = [_width_and_height(size.size) for size in sizes]
  with _with_memory(image, max_pixels) as opened:
    if scaled:
      width, height = np.max(shapes, axis=0).tolist()
      opened.draft(None, (width, height))
    converted = rgb.converted(opened)
    return [_resize(converted, shape) for shape in shapes]


@contextlib.contextmanager
def _with_memory(image: object, max_pixels: int) -> Iterator[PIL.Image.Image]:
  """An image whose size is allowed, and the memory to decode and resize it."""
  try:
    with _opened(image, max_pixels) as opened:
      image_limits.check_size(*opened.size, max_pixels)
      with image_limits.DECODED.reserved(image_limits.memory(opened)):
        yield opened
  except MemoryError as error:
    detail = f"needs more memory than there is: {error}"
    raise BadSample("too_large", detail) from error


@contextlib.contextmanager
def _opened(image: object, max_pixels: int) -> Iterator[PIL.Image.Image]:
  """A PIL image whose size is known, and whose pixels may not be."""
  if isinstance(image, np.ndarray):
    yield rgb.from_array(image)
  elif isinstance(image, PIL.Image.Image):
    _check_unread(image, max_pixels)
    yield image
  elif isinstance(image, bytes):
    yield _read(image, max_pixels)
  elif isinstance(image, str | os.PathLike):
    with _content(image) as content:
      yield _read(content, max_pixels)
  else:
    raise BadSample(
      "not_an_image",
      "expected a path, bytes, array or PIL image, found "
      f"{type(image).__name__}",
    )


@contextlib.contextmanager
def _content(path: str | os.PathLike) -> Iterator[bytes]:
  name = os.fspath(path)
  with contextlib.ExitStack() as held:
    try:
      file = held.enter_context(files.open_read(path))
      size = file.seek(0, os.SEEK_END)
      image_limits.check_bytes(size)
      held.enter_context(image_limits.ENCODED.reserved(size))
      file.seek(0)
      content = file.read(size)
    except FileNotFoundError as error:
      raise BadSample("missing", name) from error
    except files.Unavailable:  # no image could be read
      raise
    except (OSError, ValueError) as error:
      raise BadSample("unreadable", f"{name}: {error}") from error
    yield content


def _read(content: bytes, max_pixels: int) -> PIL.Image.Image:
  try:
    image_limits.check_bytes(len(content))
    image_headers.check(content, max_pixels)
    stream = image_limits.Stream(content)
    return PIL.Image.open(stream, formats=_FORMATS)
  except PIL.UnidentifiedImageError as error:
    known = ", ".join(_FORMATS)
    detail = f"expected {known}; found what begins with {content[:16]!r}"
    raise BadSample("not_an_image", detail) from error
  except (BadSample, MemoryError):
    raise
  except Exception as error:
    raise rgb.damaged(error) from error


def _check_unread(image: PIL.Image.Image, max_pixels: int) -> None:
  """Checks what PIL reads only when the pixels are needed."""
  if not isinstance(image, PIL.ImageFile.ImageFile) or not image.tile:
    return
  if image.format not in (*_FORMATS, "MPO"):
    detail = f"expected one of {_FORMATS}, found {image.format}; load it first"
    raise BadSample("not_an_image", detail)
  try:
    if (file := image.fp) is None:
      raise ValueError("the image was closed before it was read")
    position = file.tell()
    file.seek(0)
    content = file.read(image_limits.MAX_BYTES + 1)
    file.seek(position)
  except (OSError, ValueError) as error:
    raise rgb.damaged(error) from error
  image_limits.check_bytes(len(content))
  image_headers.check(content, max_pixels)


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
  crop = np.ascontiguousarray(image[top : top + height, left : left + width])
  resized = _resize(PIL.Image.fromarray(crop), _width_and_height(size))
  return np.ascontiguousarray(resized[:, ::-1]) if flip else resized


def frame_numbers(
  total: int, num_frames: int, where: str
) -> Int[np.ndarray, " num_frames"]:
  """Returns the frames to take of a video: the first one, and more in equal
  steps.

  Raises:
    BadSample: it has fewer; says where.
  """
  if total < num_frames:
    detail = f"{where}: expected {num_frames} frames or more, found {total}"
    raise BadSample("too_few_frames", detail)
  return np.arange(num_frames) * total // num_frames


def _resize(image: PIL.Image.Image, size: tuple[int, int]) -> Resized:
  return np.array(image.resize(size, PIL.Image.Resampling.BICUBIC))


def _width_and_height(size: Size) -> tuple[int, int]:
  height, width = (size, size) if isinstance(size, int) else size
  return width, height


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
    pixels = PIL.Image.fromarray(np.ascontiguousarray(image))
    return _resize(pixels, _width_and_height(self.size))


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
