"""One name for an image, in the results of a run and in files of references."""

import collections
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

ImageId = int | str

_DIGITS = re.compile(r"[0-9]{1,18}")
_NUMBER = re.compile(r"(?:COCO_[a-z]+\d{4}_)?([0-9]{1,18})(?:\.\w+)?")
_NUMBER_AT_END = re.compile(r"[^0-9:]([0-9]{1,18})\.\w+$")


def from_id(image_id: ImageId) -> ImageId:
  """The name of an image with this id; a decimal string becomes a number."""
  is_number = isinstance(image_id, str) and _DIGITS.fullmatch(image_id)
  return int(image_id) if is_number else image_id


def from_path(path: str) -> ImageId:
  """The name of an image file without an id.

  It is the number that COCO's file names contain (391895 for
  COCO_val2014_000000391895.jpg) or that is all of the file name (12 for
  12.jpg), else the file name.
  """
  name = os.path.basename(path)
  match = _NUMBER.fullmatch(name)
  return int(match[1]) if match else name


def of_images(images: Sequence[tuple[ImageId | None, str]]) -> list[ImageId]:
  """Names images, each differently.

  Args:
    images: different ones; for each its `image_id`, or None, and its path, or
      where else it comes from.

  Returns:
    `from_id` or, without an id, `from_path`. Of images that would have the same
    name, those without an id get as much of the end of their path as tells
    them apart: a/1.jpg and b/1.jpg.
  """
  names = [
    from_path(path) if image_id is None else from_id(image_id)
    for image_id, path in images
  ]
  parts = [os.path.normpath(path).split("/") for _, path in images]
  for depth in range(1, max(map(len, parts), default=0) + 1):
    counts = collections.Counter(names)
    if len(counts) == len(names):
      break
    for n, (image_id, _) in enumerate(images):
      if counts[names[n]] > 1 and image_id is None:
        names[n] = "/".join(parts[n][-depth:])
  return names


def renamed(
  references: Mapping[ImageId, Any], names: Collection[ImageId]
) -> dict[ImageId, Any]:
  """Gives references the names that results have for the same images.

  Names that differ fit if one is the end of the other's path (0.png and
  images/0.png), or if the result's is the number at the end of the reference's
  (42 and img_42.jpg, as the original names images). A name that fits several
  images is not used.

  Returns:
    The references in their order; those that fit no result keep their names.
  """
  results = [name for name in names if name not in references]
  others = references.keys() - set(names)
  by_end = collections.defaultdict(set)
  for reference in others:
    for end in (*_ends(reference), *_number_at_end(reference)):
      by_end[end].add(reference)
  results_of = collections.defaultdict(list)
  for result in results:
    fitting = by_end[result].union(others.intersection(_ends(result)))
    if len(fitting) == 1:
      results_of[fitting.pop()].append(result)
  new_names = {k: v[0] for k, v in results_of.items() if len(v) == 1}
  return {new_names.get(k, k): value for k, value in references.items()}


def _ends(name: ImageId) -> Iterator[ImageId]:
  """What else an image may be called: the ends of its path."""
  if isinstance(name, str):
    parts = os.path.normpath(name).split("/")
    yield from ("/".join(parts[n:]) for n in range(len(parts)))
    yield from_path(name)


def _number_at_end(name: ImageId) -> Iterator[int]:
  if match := _NUMBER_AT_END.search(str(name)):
    yield int(match[1])
