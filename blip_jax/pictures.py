"""Pictures as users have them: paths, URLs, bytes, arrays, PIL's."""

import contextlib
import itertools
import os
import urllib.request
from collections.abc import Iterable, Iterator

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from blip_jax.data import datasets, transforms
from blip_jax.runtime import ahead

# A path, a URL, encoded bytes, uint8 pixels, or one of PIL's.
Picture = str | os.PathLike | bytes | np.ndarray | PIL.Image.Image
# Of a picture that a URL names.
MAX_DOWNLOAD_BYTES = 64 << 20
TIMEOUT_SECONDS = 30


def one_or_many(images: Picture | Iterable[Picture]) -> Iterable[Picture]:
  alone = isinstance(images, Picture) and np.ndim(images) < 4
  return [images] if alone else images


def batches(
  images: Picture | Iterable[Picture],
  size: transforms.EvalImage,
  batch_size: int,
  urls: bool = False,
) -> Iterator[tuple[UInt8[np.ndarray, "I H W 3"], int]]:
  """Pictures in one size, and how many of a batch they are; the rest of the
  last is black, so that it needs no program of its own.

  Raises:
    ValueError: a picture cannot be read; says which.
  """

  def read(item: tuple[int, Picture]):
    number, picture = item
    try:
      return size(open_picture(picture, urls))
    except transforms.BadSample as error:
      raise ValueError(f"picture {number}: {error}") from error

  numbered = enumerate(one_or_many(images))
  with contextlib.closing(
    ahead.map_ahead(read, numbered, 2 * batch_size)
  ) as pictures:
    while batch := list(itertools.islice(pictures, batch_size)):
      blank = [np.zeros_like(batch[0])] * (batch_size - len(batch))
      yield np.stack([*batch, *blank]), len(batch)


def open_picture(picture: Picture, urls: bool = False) -> transforms.Image:
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
  return transforms.decode(picture, datasets.MAX_PIXELS)


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
