"""The input pipeline: sources -> order -> examples -> batches of numpy arrays.

The order depends only on the seed and on the position in one endless stream.
Of each global batch, a process takes one block (`position.Share`). An unusable
row stays in the stream as a `Bad` marker and is dropped here, in the main
process. So neither threads nor worker processes change the training data, and
the position is all that a checkpoint has to store.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import grain
import numpy as np

from blip_jax.data import examples, order, position, rejects
from blip_jax.data import sources as sources_lib
from blip_jax.runtime import processes

Batch = tuple[dict[str, np.ndarray], list[str]]

# Batches that are prepared while the device computes a step.
_BATCHES_AHEAD = 2
# Smaller arrays are sent between processes without shared memory.
_MIN_SHARED_BYTES = 1 << 14


@dataclasses.dataclass(frozen=True)
class _Prepare:
  """Turns (source, row) into `_Row`, or into `Bad`."""

  sources: tuple[Any, ...]
  example: examples.Example

  def __call__(
    self, pick: tuple[int, int], rng: np.random.Generator
  ) -> "_Row | rejects.Bad":
    source, row = pick
    id = f"source {source}, row {row}"
    try:
      record = self.sources[source][row]
      id = record["id"]
      numbered = record | {"source_number": self._first(source)}
      return _Row(id, self.example(numbered, rng), _lost(record))
    except Exception as error:
      return sources_lib.as_bad(id, error)

  def _first(self, source: int) -> int:
    """The number of a source; that of the first if it is there repeatedly."""
    same = self.sources[source]
    return next(n for n, each in enumerate(self.sources) if each is same)


class _Row(NamedTuple):
  """An example, the id of its record, and captions of it that are lost."""

  id: str
  example: Any
  lost: Sequence[rejects.Bad] = ()


def _lost(record: sources_lib.Record) -> Sequence[rejects.Bad]:
  """The unusable captions of a list; one that is alone costs its row."""
  if not isinstance(record.get("caption"), (list, tuple)):
    return ()
  _, lost = sources_lib.usable_captions(record)
  return lost


def _read_ahead(
  stream: grain.MapDataset, batch_size: int, num_workers: int, num_threads: int
) -> grain.DatasetIterator:
  """Reads a stream ahead of its consumer, in order."""
  ahead = _BATCHES_AHEAD * batch_size
  _disable_opencv_threads()
  ds = stream.to_iter_dataset(
    grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead)
  )
  if num_workers:
    ds = ds.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=num_workers,
        per_worker_buffer_size=math.ceil(ahead / num_workers),
      ),
      worker_init_fn=_begin_worker,
    )
    # For a token array, a shared memory segment costs more than a copy.
    options = grain.experimental.DatasetOptions(min_shm_size=_MIN_SHARED_BYTES)
    ds = grain.experimental.WithOptionsIterDataset(ds, options)
  return iter(ds)


def _begin_worker(*_: Any) -> None:
  processes.begin_worker()
  _disable_opencv_threads()


def _disable_opencv_threads() -> None:
  # The pipeline has its own threads; OpenCV's would compete with them.
  cv2.setNumThreads(0)


class TrainLoader(grain.DatasetIterator):
  """Endless batches; see `train_loader`. Orbax saves it like a grain iterator.

  The state is the number of rows, good and bad, that this process has read
  from the stream. It does not depend on threads and workers. The states of all
  processes together tell another number of processes which rows are left: none
  is lost, and none is read again.

  Attributes:
    rows_per_epoch: over all processes; the mean, if splits rotate.
    num_rows: of all sources.
  """

  def __init__(
    self,
    stream: grain.MapDataset,
    open_rows: Callable[[grain.MapDataset], grain.DatasetIterator],
    collate: Callable[[Sequence[Any]], examples.Arrays],
    share: position.Share,
    epoch_lengths: Sequence[int],
    bad_samples: rejects.BadSamples,
  ):
    super().__init__()
    self._share = share
    self._stream = stream
    self._open_rows = open_rows
    self._collate = collate
    self.rows_per_epoch = sum(epoch_lengths) / len(epoch_lengths)
    self.num_rows = sum(epoch_lengths)
    self._bad_samples = bad_samples
    self._left = position.Left()
    self._next_index = 0
    self._rows: grain.DatasetIterator | None = None

  def __next__(self) -> Batch:
    self._assert_not_closed()
    rows = self._started_rows()
    good = []
    while len(good) < self._share.batch_size:
      row = next(rows)
      self._next_index += 1
      if not self._bad_samples.count(row):
        good.append(row)
    return _batch(self._collate, good, [True] * len(good))

  def start_prefetch(self) -> None:
    self._started_rows()

  def _started_rows(self) -> grain.DatasetIterator:
    if self._rows is None:
      rows = position.Rows(
        self._stream, self._left, self._share, self._next_index
      )
      self._rows = self._open_rows(grain.MapDataset.source(rows))
      self._rows.start_prefetch()
    return self._rows

  def get_state(self) -> dict[str, Any]:
    return {
      "next_index": self._next_index,
      "process_count": self._share.process_count,
      "batch_size": self._share.batch_size,
      "num_rows": self.num_rows,
      "left": dataclasses.asdict(self._left),
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on where all processes of a run were.

    Args:
      state: from `get_state` if it was a single process, else
        `{"processes": [state, ...]}`.

    Raises:
      ValueError: a state is missing.
    """
    states = state.get("processes", [state])
    count = states[0]["process_count"]
    if len(states) != count:
      raise ValueError(
        f"expected the positions of {count} processes, found {len(states)}"
      )
    self._close_rows()
    # Runs of earlier versions started at 0, and dealt out single rows.
    self._left = position.Left(**states[0].get("left", {}))
    batch_size = states[0].get("batch_size", 1)
    counts = [each["next_index"] for each in states]
    if (count, batch_size) == self._share[1:]:
      self._next_index = counts[self._share.process_index]
    else:
      self._left = self._left.after(counts, batch_size)
      self._next_index = 0

  def close(self) -> None:
    if not self._closed:
      self._closed = True
      self._close_rows()

  def _close_rows(self) -> None:
    if self._rows is not None:
      self._rows.close()
      self._rows = None


def train_loader(
  sources: Sequence[Any],
  example: examples.Example,
  *,
  batch_size: int,
  seed: int,
  weights: Sequence[float | int] = (),
  rotate: Sequence[Any] = (),
  num_workers: int = 0,
  num_threads: int = 8,
  process_index: int = 0,
  process_count: int = 1,
  bad_samples: rejects.BadSamples | None = None,
) -> TrainLoader:
  """Returns an iterator over endless batches: (arrays, ids of the rows).

  The arrays are the examples of a batch, collated, and `valid` [B], which is
  always true. Global batch k is the same for every number of processes (as long
  as no row is bad). `close()` ends its threads.

  Args:
    sources: data sets to train on; see `blip_jax.data.sources`.
    example: turns a record and a random generator into an example, and
      examples into a batch. Whatever it raises skips the row.
    batch_size: rows per process.
    seed: of the order of rows and of all augmentation.
    weights: see `order.picks`.
    rotate: see `order.picks`.
    num_workers: processes that prepare examples; 0 uses only threads.
    num_threads: threads in each of those processes.
    process_index: of this process in a distributed run.
    process_count: of the distributed run.
    bad_samples: counts and lists unusable rows.

  Raises:
    ValueError: the sources have no rows, or `weights` do not fit them.
  """
  epoch_lengths = order.epoch_lengths(sources, rotate)
  if not sum(epoch_lengths):
    raise ValueError(
      "config.data: there is nothing to train on: the sources of "
      "config.data.train and config.data.rotate have no rows."
    )
  picks = order.picks(sources, seed=seed, weights=weights, rotate=rotate)
  # The generator depends on the seed and the position before the stream is
  # split over processes, so their number does not change the augmentation.
  stream = picks.random_map(_Prepare((*sources, *rotate), example), seed=seed)
  open_rows = functools.partial(
    _read_ahead,
    batch_size=batch_size,
    num_workers=num_workers,
    num_threads=num_threads,
  )
  return TrainLoader(
    stream,
    open_rows,
    example.collate,
    position.Share(process_index, process_count, batch_size),
    epoch_lengths=epoch_lengths,
    bad_samples=bad_samples or rejects.BadSamples(),
  )


class EvalLoader:
  """Batches with every row of a source, once; see `eval_loader`."""

  def __init__(
    self,
    source: Any,
    example: examples.Example,
    share: position.Share,
    num_threads: int,
    bad_samples: rejects.BadSamples,
  ):
    self._share = share
    self._num_rows = len(source)
    self._example = example
    self._prepare = _Prepare((source,), example)
    self._num_threads = num_threads
    self._bad_samples = bad_samples

  def __len__(self) -> int:
    global_batch = self._share.batch_size * self._share.process_count
    return -(-self._num_rows // global_batch)

  def __iter__(self) -> Iterator[Batch]:
    positions = grain.MapDataset.range(len(self) * self._share.batch_size)
    stream = positions.map(self._at)
    rows = _read_ahead(stream, self._share.batch_size, 0, self._num_threads)
    try:
      for _ in range(len(self)):
        yield self._batch(list(itertools.islice(rows, self._share.batch_size)))
    finally:
      rows.close()
    self._bad_samples.check()

  def _at(self, number: int) -> Any:
    """Returns a row of the batches of this process."""
    row = self._share.index(number)
    return self._row(row) if row < self._num_rows else _PADDING

  def _row(self, row: int) -> Any:
    # Seeded by row, not by position, so that neither the batch size nor the
    # number of processes changes an example.
    return self._prepare((0, row), np.random.default_rng(row))

  def _batch(self, rows: list[Any]) -> Batch:
    valid = [
      row is not _PADDING and not self._bad_samples.count(row) for row in rows
    ]
    filled = [
      row if good else _Row(row.id, self._example.blank())
      for row, good in zip(rows, valid, strict=True)
    ]
    return _batch(self._example.collate, filled, valid)


# Fills up the last batches; its id is empty.
_PADDING = rejects.Bad("", "padding", "")


def eval_loader(
  source: Any,
  example: examples.Example,
  batch_size: int,
  *,
  num_threads: int = 8,
  process_index: int = 0,
  process_count: int = 1,
  bad_samples: rejects.BadSamples | None = None,
) -> EvalLoader:
  """Returns an iterable over every row once, in order: (arrays, ids).

  With global batches of n rows, batch k holds rows k n to (k + 1) n - 1; each
  process has one block of `batch_size` rows. All processes have the same
  number of batches. Where a row is unusable, or none is left to fill the last
  batch, `valid` [B] is False and the arrays hold `example.blank()`; rows that
  only fill the batch have an empty id. The random generator passed to
  `example` depends only on the row.

  Args:
    source: see `blip_jax.data.sources`.
    example: turns records into examples, and examples into batches.
    batch_size: rows per process.
    num_threads: threads that prepare examples.
    process_index: of this process in a distributed run.
    process_count: of the distributed run.
    bad_samples: counts and lists unusable rows.

  Raises:
    ValueError: too many rows are unusable. Raised while iterating, at the
      latest at the end of a pass.
  """
  return EvalLoader(
    source,
    example,
    position.Share(process_index, process_count, batch_size),
    num_threads,
    bad_samples or rejects.BadSamples(),
  )


def _batch(
  collate: Callable[[Sequence[Any]], examples.Arrays],
  rows: Sequence[_Row],
  valid: Sequence[bool],
) -> Batch:
  arrays = collate([row.example for row in rows])
  return arrays | {"valid": np.array(valid)}, [row.id for row in rows]
