"""Images as users have them: paths, URLs, bytes, arrays, PIL images."""

import contextlib
import dataclasses
import itertools
import os
import urllib.request
from collections.abc import Iterable, Iterator

import jax
import numpy as np
import PIL.Image
from jaxtyping import UInt8

from blip_jax.data import transforms
from blip_jax.runtime import ahead, sharding

# A path, a URL, encoded bytes, uint8 pixels [H, W, 3], or a PIL image; where
# videos are expected, the path of one.
Image = str | os.PathLike | bytes | np.ndarray | PIL.Image.Image

MAX_DOWNLOAD_BYTES = 64 << 20
TIMEOUT_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class ImageReader:
  """Reads an image, or frames of a video, as pixels of one size.

  Attributes:
    size: resizes a decoded image.
    urls: whether an image may be an http(s) URL, which is then downloaded.
    num_frames: frames sampled from each video; 0: the inputs are images.
  """

  size: transforms.EvalImage
  urls: bool = False
  num_frames: int = 0

  def __call__(self, image: Image) -> UInt8[np.ndarray, "..."]:
    """Returns pixels [H, W, 3], or [F, H, W, 3] of a video.

    Raises:
      transforms.BadSample: the image or video cannot be read.
      ValueError: it is a URL, and `urls` is not set.
    """
    if not self.num_frames:
      return self.size(open_image(image, self.urls))
    if not isinstance(image, str | os.PathLike):
      raise ValueError(
        f"expected the path of a video, found {type(image).__name__}; for "
        "images leave out num_frames="
      )
    # Needs an extra of the package.
    from blip_jax.data import video

    return video.read(image, self.num_frames, self.size.size)


def as_iterable(images: Image | Iterable[Image]) -> Iterable[Image]:
  """A single image as a list of one; anything else as it is."""
  # An array of four dimensions is a stack of images.
  if isinstance(images, np.ndarray):
    return [images] if images.ndim < 4 else images
  if isinstance(images, Image):
    return [images]
  return images


def batches(
  images: Image | Iterable[Image],
  read: ImageReader,
  batch_size: int,
  mesh: jax.sharding.Mesh,
) -> Iterator[tuple[UInt8[np.ndarray, "I ..."], int]]:
  """Reads images in threads and yields batches of their pixels.

  The last batch is padded with black images, so that one program serves all
  batches. If there are fewer images than `batch_size`, the only batch has the
  next power of two.

  Yields:
    Pixels of a batch, and how many of its images are not padding.

  Raises:
    ValueError: an image cannot be read; says which.
  """

  def read_one(item: tuple[int, Image]) -> np.ndarray:
    number, image = item
    try:
      return read(image)
    except transforms.BadSample as error:
      raise ValueError(f"image {number}: {error}") from error

  size = sharding.padded_batch_size(batch_size, mesh)
  pixels = ahead.map_ahead(read_one, enumerate(as_iterable(images)), 2 * size)
  with contextlib.closing(pixels):
    batch = list(itertools.islice(pixels, size))
    power = 1 << max(len(batch) - 1, 0).bit_length()
    size = min(size, sharding.padded_batch_size(power, mesh))
    while batch:
      padding = [np.zeros_like(batch[0])] * (size - len(batch))
      yield np.stack([*batch, *padding]), len(batch)
      batch = list(itertools.islice(pixels, size))


def open_image(image: Image, urls: bool = False) -> transforms.Image:
  """Returns the RGB pixels [H, W, 3] of an image, however it is given.

  Raises:
    transforms.BadSample: it cannot be read.
    ValueError: it is a URL, and `urls` is not set.
  """
  if isinstance(image, str) and image.startswith(("http://", "https://")):
    if not urls:
      raise ValueError(
        f"{image}: URLs are downloaded only on request; set urls=True"
      )
    image = _download(image)
  return transforms.decode(image, transforms.MAX_PIXELS)


def _download(url: str) -> bytes:
  try:
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
      content = response.read(MAX_DOWNLOAD_BYTES + 1)
  except OSError as error:
    raise transforms.BadSample("missing", f"{url}: {error}") from error
  if len(content) > MAX_DOWNLOAD_BYTES:
    detail = f"{url}: more than {MAX_DOWNLOAD_BYTES} bytes"
    raise transforms.BadSample("too_large", detail)
  return content
