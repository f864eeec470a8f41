"""What images are called in files of results and references, and which of
these names are of the same image.

An image has an id of its source, or a path, or both. The two are different
kinds of names: the number in 5.png is not the `image_id` 5. Only COCO's file
names contain ids.
"""

import collections
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

ImageId = int | str

_DIGITS = re.compile(r"[0-9]{1,18}")
_NUMBER = re.compile(r"(?:COCO_[a-z]+\d{4}_)?([0-9]{1,18})(?:\.\w+)?")
_NUMBER_AT_END = re.compile(r"[^0-9:]([0-9]{1,18})\.\w+$")


class Image(NamedTuple):
  """What is known of an image.

  Attributes:
    image_id: of its source, or None. In COCO's format of results it may also be
      a name that `of_images` made of the path.
    path: of its file, or where else it comes from; "" if that is unknown.
  """

  image_id: ImageId | None
  path: str = ""

  @property
  def keys(self) -> list[tuple[str, ImageId]]:
    """Keys that other rows of the image share."""
    keys: list[tuple[str, ImageId]] = []
    if self.path:
      keys.append(("path", os.path.normpath(self.path)))
    if self.image_id is not None:
      keys.append(("image_id", from_id(self.image_id)))
    return keys


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


def of_images(images: Sequence[Image]) -> list[ImageId]:
  """Names different images, each differently, in COCO's format of results.

  Returns:
    `from_id` or, without an id, `from_path`. Of images that would have the same
    name, those without an id get as much of the end of their path as tells
    them apart: a/1.jpg and b/1.jpg.
  """
  names = [
    from_path(image.path) if image.image_id is None else from_id(image.image_id)
    for image in images
  ]
  parts = [os.path.normpath(image.path).split("/") for image in images]
  for depth in range(1, max(map(len, parts), default=0) + 1):
    counts = collections.Counter(names)
    if len(counts) == len(names):
      break
    for n, image in enumerate(images):
      if counts[names[n]] > 1 and image.image_id is None:
        names[n] = "/".join(parts[n][-depth:])
  return names


def matched(
  results: Sequence[Image],
  references: Sequence[Image],
  by: str | None = None,
) -> list[int | None]:
  """Finds the reference of each result.

  Args:
    results: different images.
    references: different images.
    by: "image_id" or "path": what says which images are the same. None: ids
      where both have them, and paths elsewhere. A result that has only an
      `image_id` may mean either.

  Returns:
    For each result the row of its reference, or None.

  Raises:
    ValueError: ids and paths contradict each other, and `by` is None.
  """
  by_path = _by_path(results, references)
  by_id = _by_id(results, references)
  if by == "path":
    return by_path
  # A source with ids may have images without.
  for n, row in enumerate(by_path):
    is_free = row is not None and references[row].image_id is None
    if by_id[n] is None and is_free:
      by_id[n] = row
  if by == "image_id":
    return by_id
  contradictions = [
    (image, references[one], references[other])
    for image, one, other in zip(results, by_id, by_path, strict=True)
    if one is not None and other is not None and one != other
    if not _may_be_of_path(image)
  ]
  if not contradictions:
    return _first(by_path, by_id)
  if None in by_id or None in by_path:
    return by_id if by_id.count(None) < by_path.count(None) else by_path
  image, one, other = map(_shown, contradictions[0])
  raise ValueError(
    f"Which image is {image} of the results? By its id it is {one} of the "
    f"references, by its file name {other}; this is so for "
    f"{len(contradictions)} of {len(results)} images. Expected ids and file "
    "names of the same images, or results with the path of each 'image'. In "
    "score_captions, --by image_id or --by path says which of them counts."
  )


def _first(*columns: list[int | None]) -> list[int | None]:
  """In each place the first entry that is not None."""
  return [
    next((row for row in rows if row is not None), None)
    for rows in zip(*columns, strict=True)
  ]


def _may_be_of_path(image: Image) -> bool:
  """Whether the `image_id` may be only a name of the path, which is known."""
  if not image.path or image.image_id is None:
    return False
  return from_id(image.image_id) in _names(image.path)


def _shown(image: Image) -> str:
  return ", ".join(
    text
    for text in (
      "" if image.image_id is None else f"image_id {image.image_id!r}",
      image.path,
    )
    if text
  )


def _by_id(
  results: Sequence[Image], references: Sequence[Image]
) -> list[int | None]:
  row_of_id = {
    from_id(image.image_id): row
    for row, image in enumerate(references)
    if image.image_id is not None
  }
  return [
    None if image.image_id is None else row_of_id.get(from_id(image.image_id))
    for image in results
  ]


def _by_path(
  results: Sequence[Image], references: Sequence[Image]
) -> list[int | None]:
  """Compares paths: the whole of them, or the end that one of them lacks the
  beginning of, or the names of files if they are unique.

  A result without a path may have a name that `of_images` makes, or the number
  at the end of a file name (42 for img_42.jpg, as the original names images).
  Names that fit several images are not used.
  """
  rows_of_name: dict[ImageId, set[int]] = collections.defaultdict(set)
  rows_of_number: dict[int, set[int]] = collections.defaultdict(set)
  row_of_path: dict[str, int] = {}
  for row, image in enumerate(references):
    if image.path:
      row_of_path.setdefault(os.path.normpath(image.path), row)
      for name in _names(image.path):
        rows_of_name[name].add(row)
      number = _NUMBER_AT_END.search(image.path)
      if number and image.image_id is None:
        rows_of_number[int(number[1])].add(row)
  only = lambda rows: next(iter(rows)) if len(rows) == 1 else None
  found: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
  for n, image in enumerate(results):
    path = _path(image)
    if isinstance(path, int):
      fits = [
        only(rows_of_name.get(path, ())),
        only(rows_of_number.get(path, ())),
      ]
    else:
      ends = [*_ends(path)]
      fits = [
        row_of_path.get(path),
        only(rows_of_name.get(path, ())),
        *(row_of_path.get(end) for end in ends[1:]),
      ]
      if image.path:
        fits.append(only(rows_of_name.get(from_path(path), ())))
    for strength, row in enumerate(fits):
      if row is not None:
        found[row].append((strength, n))
        break
  matches: list[int | None] = [None] * len(results)
  for row, fitting in found.items():
    (best, n), *others = sorted(fitting)
    if not others or others[0][0] > best:
      matches[n] = row
  return matches


def _path(image: Image) -> str | int:
  """The path of a result; without one, its id, which may be made of one."""
  if image.path:
    return os.path.normpath(image.path)
  name = from_id("" if image.image_id is None else image.image_id)
  return os.path.normpath(name) if isinstance(name, str) else name


def _names(path: str) -> Iterator[ImageId]:
  """Whatever `of_images` may call an image with this path."""
  yield from _ends(path)
  yield from_path(path)


def _ends(path: str) -> Iterator[str]:
  """A path, and then its ever shorter ends."""
  parts = os.path.normpath(path).split("/")
  yield from ("/".join(parts[n:]) for n in range(len(parts)))
