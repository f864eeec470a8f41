"""Rows of a split by image: several rows may have captions of one image."""

from typing import Any

from blip_jax.data import rejects, sources


class ByImage:
  """A source with one row for each image, which has the captions of all rows.

  A file with one caption per row thus gives the same records as one with lists
  of captions, whatever the order of its rows. Images are in the order of their
  first rows. Texts that are no captions (empty, null, not UTF-8) are dropped. A
  row that cannot be used, or without any caption left, belongs to no image; it
  remains a row of its own, so that it is counted.

  Args:
    source: rows; those that share one of their `sources.image_keys`, also
      through other rows, are of one image. Each is read once, without decoding
      its image.

  Attributes:
    images: the rows that are images, and not such a row.
    num_captions: of all images.
    bad: rows and captions that cannot be used.
  """

  def __init__(self, source: Any):
    self._source = source
    self.num_captions = 0
    self.bad: list[rejects.Bad] = []
    good_rows, bad_rows, keys = [], [], []
    for row in range(len(source)):
      try:
        record = _with_usable_captions(source[row], self.bad)
      except sources.BadRow as bad:
        self.bad.append(rejects.Bad(bad.id, bad.reason, bad.detail))
        bad_rows.append(row)
        continue
      good_rows.append(row)
      keys.append(sources.image_keys(record))
      if "caption" in record:
        self.num_captions += len(record["caption"])
    images = [[good_rows[n] for n in rows] for rows in sources.joined(keys)]
    self._rows_of_image = sorted(images + [[row] for row in bad_rows])
    is_bad = set(bad_rows)
    self.images = [
      index
      for index, (first, *_) in enumerate(self._rows_of_image)
      if first not in is_bad
    ]

  def __len__(self) -> int:
    return len(self._rows_of_image)

  def __getitem__(self, index: int) -> sources.Record:
    first, *others = rows = [
      _with_usable_captions(self._source[row], [])
      for row in self._rows_of_image[index]
    ]
    merged = dict(first)
    for row in others:  # the first may lack what another one has
      for key in ("image", "image_id"):
        if key in row:
          merged.setdefault(key, row[key])
    if others and "caption" in first:
      merged["caption"] = [x for row in rows for x in row["caption"]]
      if any("references" in row for row in rows):
        merged["references"] = [x for row in rows for x in references(row)]
    return merged


def _with_usable_captions(
  record: sources.Record, bad: list[rejects.Bad]
) -> sources.Record:
  """A record with a list of the captions that are texts, if it has any.

  Args:
    bad: gets the others.

  Raises:
    BadRow: no caption is left.
  """
  if "caption" not in record:
    return record
  captions, lost = sources.usable_captions(record)
  if not captions:
    reason, detail = "empty_caption", "no captions"
    if lost:
      reason, detail = lost[0].reason, lost[0].detail
    raise sources.BadRow(record["id"], reason, detail)
  bad += lost
  return record | {"caption": captions}


def references(record: sources.Record) -> list[str | bytes]:
  """Returns all texts that are right about an image.

  They are the record's `references` (all true captions of a rendered scene) or,
  without those, its captions.
  """
  if "references" in record:
    return list(record["references"])
  return sources.captions(record)
