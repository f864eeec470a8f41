"""Questions about one image, or video, together: it is read and encoded once.

Dimensions: G groups, m questions of a group, n rows.
"""

import collections
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from blip_jax.data import questions, sources, transforms

# What encoding an image takes, where answering a question takes 1. The base
# model took 2 at 384 pixels on a CPU to rank 80 answers, and 5 to generate one.
_IMAGE_COST = 2


class Groups:
  """A source with a row for up to m questions about one image.

  A record is that of the first question, with the records of all of them under
  `asked`. Groups are in the order of their first rows. A row that cannot be
  used is alone, so that it costs no other; so are all rows of a source whose
  images are no files.

  Args:
    source: rows of questions. Each is read once, without its image.
    max_words: of a question.
    num_frames: of each video; 0: they are images.
    at_most: m may be.

  Attributes:
    size: m, which takes the least time; see `group_size`.
    rows: of each group, [G, m]; -1 where there are fewer.
  """

  def __init__(
    self, source: Any, max_words: int, num_frames: int, at_most: int
  ):
    self._source = source
    of_images = _rows_of_images(source, max_words)
    counts = collections.Counter(map(len, of_images))
    self.size = m = group_size(
      counts, _IMAGE_COST * max(num_frames, 1), at_most
    )
    groups = [
      rows[start : start + m]
      for rows in of_images
      for start in range(0, len(rows), m)
    ]
    groups.sort()
    self.rows: Int[np.ndarray, "G m"] = np.full((len(groups), m), -1)
    for group, rows in enumerate(groups):
      self.rows[group, : len(rows)] = rows

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> sources.Record:
    rows = self.rows[index]
    asked = [self._source[row] for row in rows[rows >= 0].tolist()]
    return {**asked[0], "asked": asked}

  def by_row(
    self, values: Shaped[np.ndarray, "G m ..."]
  ) -> Shaped[np.ndarray, "n ..."]:
    """Returns values of the questions of groups in the order of the rows."""
    found = np.zeros((len(self._source), *values.shape[2:]), values.dtype)
    is_row = self.rows >= 0
    found[self.rows[is_row]] = values[is_row]
    return found


def group_size(counts: Mapping[int, int], image_cost: int, at_most: int) -> int:
  """Returns the number of questions of a group that takes the least time.

  A larger group encodes an image fewer times, and has more places without a
  question, which cost as much as one.

  Args:
    counts: numbers of questions -> how many images have so many.
    image_cost: of an image, where that of a question is 1.
    at_most: the result.
  """
  sizes = np.arange(1, at_most + 1)
  cost = np.zeros(at_most)
  for count, images in counts.items():
    cost += images * -(-count // sizes) * (image_cost + sizes)
  return int(sizes[cost.argmin()])


def _rows_of_images(source: Any, max_words: int) -> list[list[int]]:
  found: dict[Any, list[int]] = collections.defaultdict(list)
  for row in range(len(source)):
    try:
      record = source[row]
      questions.cleaned(record["question"], max_words)
    except transforms.BadSample:
      found[row].append(row)
      continue
    path = sources.image_path(record)
    if not path:
      return [[row] for row in range(len(source))]
    found[path].append(row)
  return [*found.values()]
