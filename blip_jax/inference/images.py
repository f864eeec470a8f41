"""Pictures as users have them: paths, URLs, bytes, arrays, PIL's."""

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

# A path, a URL, encoded bytes, uint8 pixels, or one of PIL's.
Image = str | os.PathLike | bytes | np.ndarray | PIL.Image.Image
# Of a picture that a URL names.
MAX_DOWNLOAD_BYTES = 64 << 20
TIMEOUT_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class ImageReader:
  """From a picture, or a video's path, to pixels of one size.

  Attributes:
    size: brings a decoded picture to it.
    urls: whether a picture may be an http(s) URL, which is then fetched.
    num_frames: taken of each, which then is a video; 0: of pictures.
  """

  size: transforms.EvalImage
  urls: bool = False
  num_frames: int = 0

  def __call__(self, picture: Image) -> UInt8[np.ndarray, "..."]:
    if self.num_frames:
      # Needs an extra of the package.
      from blip_jax.data import video

      return video.read(picture, self.num_frames, self.size.size)
    return self.size(open_image(picture, self.urls))


def one_or_many(images: Image | Iterable[Image]) -> Iterable[Image]:
  alone = isinstance(images, Image) and np.ndim(images) < 4
  return [images] if alone else images


def batches(
  images: Image | Iterable[Image],
  read: ImageReader,
  batch_size: int,
  mesh: jax.sharding.Mesh,
) -> Iterator[tuple[UInt8[np.ndarray, "I ..."], int]]:
  """Pictures in one size, and how many of a batch they are; the others are
  black, so that one program serves all batches. A few pictures, which are no
  whole batch, are one of a power of two.

  Raises:
    ValueError: a picture cannot be read; says which.
  """

  def numbered(item: tuple[int, Image]):
    number, picture = item
    try:
      return read(picture)
    except transforms.BadSample as error:
      raise ValueError(f"picture {number}: {error}") from error

  size = sharding.padded_batch_size(batch_size, mesh)
  with contextlib.closing(
    ahead.map_ahead(numbered, enumerate(one_or_many(images)), 2 * size)
  ) as found:
    batch = list(itertools.islice(found, size))
    power = 1 << max(len(batch) - 1, 0).bit_length()
    size = min(size, sharding.padded_batch_size(power, mesh))
    while batch:
      blank = [np.zeros_like(batch[0])] * (size - len(batch))
      yield np.stack([*batch, *blank]), len(batch)
      batch = list(itertools.islice(found, size))


def open_image(picture: Image, urls: bool = False) -> transforms.Image:
  """Pixels of a picture, however it is given.

  Raises:
    transforms.BadSample: it cannot be read.
    ValueError: it is a URL, and `urls` is not set.
  """
  if isinstance(picture, PIL.Image.Image):
    picture = np.asarray(picture.convert("RGB"))
  if isinstance(picture, str) and picture.startswith(("http://", "https://")):
    if not urls:
      raise ValueError(
        f"{picture}: is a URL, and nothing is fetched unless asked for; set "
        "urls=True"
      )
    picture = _fetch(picture)
  return transforms.decode(picture, transforms.MAX_PIXELS)


def _fetch(url: str) -> bytes:
  try:
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as response:
      content = response.read(MAX_DOWNLOAD_BYTES + 1)
  except OSError as error:
    raise transforms.BadSample("missing", f"{url}: {error}") from error
  if len(content) > MAX_DOWNLOAD_BYTES:
    found = f"{url}: more than {MAX_DOWNLOAD_BYTES} bytes"
    raise transforms.BadSample("too_large", found)
  return content
