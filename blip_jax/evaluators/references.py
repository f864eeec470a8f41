"""The human captions of images, from the records of a split or from a file."""

import os
from typing import Any, NamedTuple

from blip_jax.data import datasets, sources
from blip_jax.evaluators import by_image
from blip_jax.evaluators.scores import caption_files, image_names
from blip_jax.runtime import files

ImageId = image_names.ImageId


class References(NamedTuple):
  """Human captions of images.

  Attributes:
    captions: by the name of the image.
    paths: of images that are named by an id, where they are known.
  """

  captions: dict[ImageId, list[str]]
  paths: dict[ImageId, str]

  def by_path(self) -> dict[ImageId, list[str]]:
    """The captions, as if no image had an id."""
    images = [
      (None, self.paths[name]) if name in self.paths else (name, "")
      for name in self.captions
    ]
    names = image_names.of_images(images)
    return dict(zip(names, self.captions.values(), strict=True))


def texts(record: sources.Record) -> list[str]:
  """Returns the captions of a record, as they are written."""
  return [_decoded(caption) for caption in sources.captions(record)]


def right_texts(record: sources.Record) -> list[str]:
  """Returns the texts that count as exactly right about an image."""
  return [_decoded(text) for text in by_image.references(record)]


def is_complete(record: sources.Record) -> bool:
  """Whether any text is wrong that `right_texts` does not list."""
  return "references" in record


def origin(record: sources.Record) -> tuple[Any, str]:
  """Returns what `image_names.of_images` needs: the id of an image, or None,
  and where it comes from."""
  if path := files.printable(sources.image_path(record)):
    return record.get("image_id"), os.path.normpath(path)
  return sources.image_id(record), record["id"]


def read(spec: str) -> References:
  """Reads reference captions.

  Args:
    spec: a file that `caption_files.read_references` reads, or any source of
      images with captions.

  Raises:
    ValueError: it is neither.
  """
  if caption_files.has_references(spec):
    captions = caption_files.read_references(spec)
    return References(captions, caption_files.read_paths(spec))
  images, captions = [], []
  source = by_image.ByImage(datasets.open_source(spec))
  for row in range(len(source)):
    try:
      record = source[row]
    except sources.BadRow:
      continue
    images.append(origin(record))
    captions.append(texts(record))
  names = image_names.of_images(images)
  paths = {
    name: path
    for name, (image_id, path) in zip(names, images, strict=True)
    if image_id is not None
  }
  return References(dict(zip(names, captions, strict=True)), paths)


def _decoded(text: str | bytes) -> str:
  return text if isinstance(text, str) else text.decode(errors="replace")
