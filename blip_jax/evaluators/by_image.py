"""Rows of a split by image: several rows may have captions of one image."""

from typing import Any

from blip_jax.data import sources


class ByImage:
  """A source with one row for each image, which has the captions of all rows.

  A file with one caption per row thus gives the same records as one with lists
  of captions, whatever the order of its rows. Images are in the order of their
  first rows. A row that cannot be used remains a row of its own, so that it is
  counted.

  Args:
    source: rows; those with the same `sources.image_key` are of one image. Each
      is read once, without decoding its image.

  Attributes:
    num_captions: of all images.
  """

  def __init__(self, source: Any):
    self._source = source
    self.num_captions = 0
    rows_of_image: dict[Any, list[int]] = {}
    for row in range(len(source)):
      try:
        record = source[row]
      except sources.BadRow:
        key = row
      else:
        key = sources.image_key(record)
        if "caption" in record:
          self.num_captions += len(sources.captions(record))
      rows_of_image.setdefault(key, []).append(row)
    self._rows_of_image = [*rows_of_image.values()]

  def __len__(self) -> int:
    return len(self._rows_of_image)

  def __getitem__(self, index: int) -> sources.Record:
    first, *others = [self._source[row] for row in self._rows_of_image[index]]
    if not others or "caption" not in first:
      return first
    rows = [first, *others]
    merged = {"caption": [x for row in rows for x in sources.captions(row)]}
    if any("references" in row for row in rows):
      merged["references"] = [x for row in rows for x in references(row)]
    return first | merged


def references(record: sources.Record) -> list[str | bytes]:
  """Returns all texts that are right about an image.

  They are the record's `references` (all true captions of a rendered scene) or,
  without those, its captions.
  """
  if "references" in record:
    return list(record["references"])
  return sources.captions(record)
