"""Which rows of the endless stream processes read, whatever their number is."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain


class Share(NamedTuple):
  """The rows of one process: a block of each global batch.

  So the global batches are the same, in the same order, for every number of
  processes, as long as no row is unusable.

  Attributes:
    process_index: of the process.
    process_count: of all processes.
    batch_size: rows of a block.
  """

  process_index: int
  process_count: int
  batch_size: int

  def index(self, number: int) -> int:
    """Where the row of a number is among those of all processes."""
    batch, row = divmod(number, self.batch_size)
    return (batch * self.process_count + self.process_index) * (
      self.batch_size
    ) + row

  def of_index(self, index: int) -> tuple[int, int]:
    """The process that has a row, and its number there."""
    block, row = divmod(index, self.batch_size)
    batch, process = divmod(block, self.process_count)
    return process, batch * self.batch_size + row


@dataclasses.dataclass(frozen=True)
class Left:
  """What is left to read of a stream.

  Attributes:
    first: positions of rows that come first.
    rest: the position from which on all rows follow.
  """

  first: Sequence[int] = ()
  rest: int = 0

  def position(self, index: int) -> int:
    """The position in the stream of a row that is left."""
    if index < len(self.first):
      return self.first[index]
    return self.rest + index - len(self.first)

  def after(self, counts: Sequence[int], batch_size: int) -> "Left":
    """What is left after each process has read so many rows of its share.

    Processes that met more unusable rows than others are ahead of them, so the
    rows that are left are not always in one piece.

    Args:
      counts: of rows that each process has read.
      batch_size: rows of a block, which were the same for all.
    """
    shares = [Share(i, len(counts), batch_size) for i in range(len(counts))]
    # From its next row on a process has read none, and before its last row all.
    start = min(
      share.index(count) for share, count in zip(shares, counts, strict=True)
    )
    end = max(
      share.index(count - 1) + 1 if count else 0
      for share, count in zip(shares, counts, strict=True)
    )
    end = max(start, end, len(self.first))
    first = []
    for index in range(start, end):
      process, number = shares[0].of_index(index)
      if number >= counts[process]:
        first.append(self.position(index))
    return Left(first, self.position(end))


@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows of a share of what is left of a stream, from a number on.

  Their random generators are those of their positions in the stream.
  """

  stream: grain.MapDataset
  left: Left
  share: Share
  start: int

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: int) -> Any:
    of_all = self.share.index(self.start + index)
    return self.stream[self.left.position(of_all)]
