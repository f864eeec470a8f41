"""Images as users have them: paths, URLs, bytes, arrays, PIL images."""

import contextlib
import dataclasses
import itertools
import logging
import os
from collections.abc import Generator, Iterable, Sequence, Sized
from typing import Any, ClassVar, NamedTuple, TypeGuard

import jax
import numpy as np
import PIL.Image
from jaxtyping import Bool, UInt8

from blip_jax.data import folders, transforms
from blip_jax.inference import urls as urls_lib
from blip_jax.runtime import ahead, files, sharding
from blip_jax.runtime import progress as progress_lib

# A path, a URL, encoded bytes, uint8 pixels [H, W, 3], or a PIL image.
Image = str | os.PathLike | bytes | np.ndarray | PIL.Image.Image
# A path, or all frames: uint8 pixels [F, H, W, 3], or images.
Video = str | os.PathLike | np.ndarray | Sequence[Image]

log = logging.getLogger(__name__)

# What to do about an image that cannot be read.
ON_ERROR = ("raise", "skip")
# Skipped images that a warning names; it counts the others.
MAX_NAMED = 20


class NotRequested(transforms.BadSample, ValueError):
  """A URL where no image may be one."""


@dataclasses.dataclass(frozen=True)
class ImageReader:
  """Reads an image, or frames of a video, as pixels of one size.

  Attributes:
    size: resizes a decoded image.
    urls: whether an image may be an http(s) URL, which is then downloaded.
    num_frames: frames sampled from each video; 0: the inputs are images.
    allow_private: whether a URL may lead to addresses that are not public.
    what: errors call it this.
    takes_videos: whether the caller can set `num_frames`.
  """

  what: ClassVar[str] = "image"
  takes_videos: ClassVar[bool] = True

  size: transforms.EvalImage
  urls: bool = False
  num_frames: int = 0
  allow_private: bool = False

  def __call__(self, image: object) -> UInt8[np.ndarray, "..."]:
    """Returns pixels [H, W, 3], or [F, H, W, 3] of a video.

    Raises:
      transforms.BadSample: the image or video cannot be read, or it is a URL,
        and `urls` is not set (`NotRequested`).
    """
    if not self.num_frames:
      return self._image(image)
    if isinstance(image, str | os.PathLike):
      # Needs an extra of the package.
      from blip_jax.data import video

      return video.read(image, self.num_frames, self.size.size)
    if not _has_frames(image):
      raise transforms.BadSample(
        "not_a_video",
        "expected the path of a video, or its frames as uint8 [F, H, W, 3] or "
        f"as a list of images, found {type(image).__name__}; for images leave "
        "out num_frames=",
      )
    numbers = transforms.frame_numbers(len(image), self.num_frames, "frames")
    return np.stack([self._image(image[n]) for n in numbers.tolist()])

  def _image(self, image: object) -> UInt8[np.ndarray, "H W 3"]:
    found = _fetched(image, self.urls, self.allow_private)
    try:
      return transforms.resized(found, [self.size], transforms.MAX_PIXELS)[0]
    except transforms.BadSample as error:
      can_ask = self.takes_videos and not self.num_frames
      if not can_ask or not _is_video(image):
        raise
      detail = f"{error.detail}. Of a video, num_frames=8 takes 8 frames"
      raise transforms.BadSample(error.reason, detail) from error

  def black(self) -> UInt8[np.ndarray, "..."]:
    """Pixels like those of `__call__`, in place of what cannot be read."""
    frames = (self.num_frames,) if self.num_frames else ()
    height, width = np.broadcast_to(self.size.size, 2)
    return np.zeros((*frames, height, width, 3), np.uint8)


def as_iterable(
  images: Image | Iterable[Any], num_frames: int = 0
) -> Iterable[Any]:
  """A single image, or video, as a list of one; anything else as it is.

  Args:
    num_frames: as for `ImageReader`.
  """
  # An array of one dimension more than a single one is a stack.
  if isinstance(images, np.ndarray):
    return [images] if images.ndim < (5 if num_frames else 4) else images
  # What is no image at all is refused by its number, like one of a list.
  if isinstance(images, Image) or not isinstance(images, Iterable):
    return [images]
  return images


def _has_frames(image: object) -> TypeGuard[np.ndarray | list | tuple]:
  """Whether this is an array or a list of frames."""
  is_array = isinstance(image, np.ndarray) and image.ndim == 4
  return is_array or isinstance(image, list | tuple)


def _is_video(image: object) -> bool:
  """Whether this is a video where an image is expected."""
  is_path = isinstance(image, str | os.PathLike)
  named = is_path and os.fsdecode(image).lower().endswith(folders.VIDEOS)
  return named or _has_frames(image)


class Batch(NamedTuple):
  """Pixels of a batch of images.

  Attributes:
    pixels: black where an image cannot be read, and where the last batch is
      padded.
    errors: for each image, why it cannot be read, or None. Padding has none.
  """

  pixels: UInt8[np.ndarray, "I ..."]
  errors: tuple[str | None, ...]

  @property
  def readable(self) -> Bool[np.ndarray, " n"]:
    """Whether each image, without the padding, can be read."""
    return np.array([error is None for error in self.errors], bool)


def batches(
  images: Image | Iterable[Any],
  read: ImageReader,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  on_error: str = "raise",
  progress: bool = False,
) -> Generator[Batch, None, None]:
  """Reads images in threads, two batches ahead, and yields them in batches.

  The last batch is padded with black images, so that one program serves all
  batches. If there are fewer images than `batch_size`, the only batch has the
  next power of two.

  Args:
    images: one image, or any number of what `read` reads; an iterator may be
      endless.
    read: reads one.
    batch_size: images per batch, rounded up to what the mesh splits evenly.
    mesh: the devices that share a batch.
    on_error: "raise", or "skip" for a warning, at the end, that names the
      images that cannot be read.
    progress: whether to show a progress bar.

  Raises:
    ValueError: at the first image that cannot be read, unless they are skipped;
      says which. Or `on_error` is unknown.
  """
  if on_error not in ON_ERROR:
    raise ValueError(
      f"on_error: expected one of {ON_ERROR}, found {on_error!r}"
    )
  images = as_iterable(images, read.num_frames)
  size = sharding.padded_batch_size(batch_size, mesh)
  return _batches(images, read, size, mesh, on_error == "skip", progress)


def _batches(
  images: Iterable[Any],
  read: ImageReader,
  size: int,
  mesh: jax.sharding.Mesh,
  skip: bool,
  progress: bool,
) -> Generator[Batch, None, None]:
  def read_one(item: tuple[int, object]) -> tuple[np.ndarray, str | None]:
    number, image = item
    try:
      return read(image), None
    except transforms.BadSample as error:
      why = where(read.what, number, image, error)
      if not skip:
        raise ValueError(why) from error
      return read.black(), why

  total = len(images) if isinstance(images, Sized) else None
  bar = progress_lib.bar(total=total, unit="img", disable=not progress)
  loaded = ahead.map_ahead(read_one, enumerate(images), 2 * size)
  skipped = _Skipped(read.what)
  with contextlib.closing(loaded), bar, contextlib.closing(skipped):
    batch = list(itertools.islice(loaded, size))
    power = 1 << max(len(batch) - 1, 0).bit_length()
    size = min(size, sharding.padded_batch_size(power, mesh))
    while batch:
      pixels, errors = zip(*batch, strict=True)
      padding = [np.zeros_like(pixels[0])] * (size - len(batch))
      skipped.add(errors)
      yield Batch(np.stack([*pixels, *padding]), errors)
      bar.update(len(batch))
      batch = list(itertools.islice(loaded, size))


def where(
  what: str, number: int, image: object, error: transforms.BadSample
) -> str:
  """The number and the path of an image, and why it cannot be read."""
  path = ""
  if isinstance(image, str | os.PathLike):
    path = files.printable(os.fspath(image))
  # The details of some errors have the path already.
  named = f", {path}" if path and path not in str(error) else ""
  return f"{what} {number}{named}: {error}"


class _Skipped:
  """Counts images, and names those that were skipped when it is closed."""

  def __init__(self, what: str):
    self._what = what
    self._num_images, self._num_skipped = 0, 0
    self._first: list[str] = []

  def add(self, errors: Sequence[str | None]) -> None:
    skipped = [error for error in errors if error is not None]
    self._num_images += len(errors)
    self._num_skipped += len(skipped)
    self._first += skipped[: MAX_NAMED - len(self._first)]

  def close(self) -> None:
    if self._num_skipped:
      log.warning(
        "%d of %d %ss cannot be read and were skipped: %s%s",
        self._num_skipped,
        self._num_images,
        self._what,
        "; ".join(self._first),
        "; ..." if self._num_skipped > MAX_NAMED else "",
      )


def _fetched(image: object, urls: bool, allow_private: bool) -> object:
  if not isinstance(image, str) or not image.startswith(urls_lib.SCHEMES):
    return image
  if not urls:
    raise NotRequested(
      "not_requested",
      f"{image}: URLs are downloaded only on request; set urls=True",
    )
  return urls_lib.fetch(image, allow_private)
