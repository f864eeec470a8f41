"""The human captions of images, from the records of a split or from a file."""

import os
from collections.abc import Sequence
from typing import NamedTuple

from blip_jax.data import datasets, rejects, sources
from blip_jax.evaluators import by_image
from blip_jax.evaluators.scores import image_names
from blip_jax.runtime import files


class References(NamedTuple):
  """Human captions of images.

  Attributes:
    images: different ones.
    captions: of each image.
    bad: rows and captions that cannot be used.
  """

  images: list[image_names.Image]
  captions: list[list[str]]
  bad: list[rejects.Bad]

  def of(
    self, images: Sequence[image_names.Image], by: str | None = None
  ) -> dict[int, list[str]]:
    """Returns the captions of images, by their place in `images`.

    Args:
      by: see `image_names.matched`, which says what raises `ValueError`.
    """
    rows = image_names.matched(images, self.images, by)
    return {
      n: self.captions[row] for n, row in enumerate(rows) if row is not None
    }


def texts(record: sources.Record) -> list[str]:
  """Returns the captions of a record, as they are written."""
  return [_decoded(caption) for caption in sources.captions(record)]


def right_texts(record: sources.Record) -> list[str]:
  """Returns the texts that count as exactly right about an image."""
  return [_decoded(text) for text in by_image.references(record)]


def is_complete(record: sources.Record) -> bool:
  """Whether any text is wrong that `right_texts` does not list."""
  return "references" in record


def origin(record: sources.Record) -> image_names.Image:
  """Returns which image a record is of."""
  path = files.printable(sources.image_path(record))
  path = os.path.normpath(path) if path else record["id"]
  return image_names.Image(sources.image_id(record), path)


def read(spec: str) -> References:
  """Reads reference captions.

  Args:
    spec: any source of images with captions; JSON and tables may name images
      by `image_id` alone, as COCO's annotations do.

  Raises:
    ValueError: it is none, or has no captions.
  """
  split = by_image.ByImage(datasets.open_references(spec))
  records = [split[row] for row in split.images]
  if not records:
    first = f", such as {split.bad[0].id}: {split.bad[0].detail}"
    raise ValueError(
      f"{spec}: expected captions, found none in {len(split)} rows{first}."
    )
  return References(
    [origin(record) for record in records],
    [texts(record) for record in records],
    split.bad,
  )


def _decoded(text: str | bytes) -> str:
  return text if isinstance(text, str) else text.decode(errors="replace")
