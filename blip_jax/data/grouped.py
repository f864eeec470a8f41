"""Rows whose parts lie apart in a file, such as an image and its captions."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from blip_jax.data import offsets, sources
from blip_jax.runtime import files

Parts = Int[np.ndarray, "parts 3"]


def parts(numbers: Sequence[int], spans: Sequence[tuple[int, int]]) -> Parts:
  """Returns an index of rows: for each part number, start and end in bytes.

  Args:
    numbers: which row each part is of, in any order.
    spans: start and end of each part. Parts of a row keep their order.
  """
  table = np.column_stack(
    [np.array(numbers, np.int64), np.array(spans, np.int64).reshape(-1, 2)]
  )
  return table[np.argsort(table[:, 0], kind="stable")]


class Grouped:
  """The rows of an index of `parts`: the bytes of all parts of each.

  Args:
    path: the file.
    index: of its rows, which is mapped if it is large.
  """

  def __init__(self, path: str, index: Parts):
    self._path = path
    self._index = offsets.Mapped(index)
    numbers = index[:, 0]
    firsts = np.flatnonzero(np.diff(numbers, prepend=-1))
    self._bounds = np.append(firsts, len(index))

  def __len__(self) -> int:
    return len(self._bounds) - 1

  def number(self, row: int) -> int:
    """Returns the number that the index has for a row."""
    return int(self._index.array[self._bounds[row], 0])

  def __getitem__(self, row: int) -> list[bytes]:
    begin, end = self._bounds[row : row + 2]
    spans = self._index.array[begin:end, 1:].tolist()
    sources.check_length(self._path, sum(end - start for start, end in spans))
    return [
      files.read_range(self._path, start, end - start) for start, end in spans
    ]
