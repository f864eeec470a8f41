"""The one input pipeline: sources -> order -> examples -> batches of numpy.

The order is a function of the seed and of a position in one endless stream,
nothing else. Process `i` of `n` takes the positions i, i + n, i + 2n, ...; a
row that cannot be used is carried along as a `Bad` marker and dropped here, in
the main process. So neither threads nor worker processes change what is
trained on, and a position is all that a checkpoint has to remember.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import grain
import numpy as np
from absl import logging

from blip_jax.data import examples, order, rejects, transforms
from blip_jax.data import sources as sources_lib

Batch = tuple[dict[str, np.ndarray], list[str]]

# Ready or under way ahead of the step that the device computes.
_BATCHES_AHEAD = 2
_MIN_SHARED_BYTES = 1 << 14


@dataclasses.dataclass(frozen=True)
class _Prepare:
  """From (source, row) to (id, arrays), or to `Bad`."""

  sources: tuple[Any, ...]
  example: examples.Example

  def __call__(self, pick: tuple[int, int], rng: np.random.Generator):
    source, row = pick
    try:
      record = self.sources[source][row]
    except sources_lib.BadRow as bad:
      return rejects.Bad(bad.id, bad.reason, bad.detail)
    try:
      return record["id"], self.example(record, rng)
    except transforms.BadSample as bad:
      return rejects.Bad(record["id"], bad.reason, bad.detail)
    except Exception as error:
      # Worker processes pass on type and message only, so both go in here.
      text = f"{record['id']}: {type(error).__name__}: {error}"
      raise RuntimeError(f"Cannot prepare the sample {text}") from error


def _read_ahead(
  stream: grain.MapDataset, batch_size: int, num_workers: int, num_threads: int
) -> grain.DatasetIterator:
  """Read a stream ahead of its consumer, in order."""
  ahead = _BATCHES_AHEAD * batch_size
  _one_thread_an_operation()
  ds = stream.to_iter_dataset(
    grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead)
  )
  if num_workers:
    ds = ds.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=num_workers,
        per_worker_buffer_size=math.ceil(ahead / num_workers),
      ),
      worker_init_fn=_one_thread_an_operation,
    )
    # A segment of shared memory per token array costs more than its copy.
    options = grain.experimental.DatasetOptions(min_shm_size=_MIN_SHARED_BYTES)
    ds = grain.experimental.WithOptionsIterDataset(ds, options)
  return iter(ds)


def _one_thread_an_operation(*_) -> None:
  # The pipeline has threads of its own; OpenCV's would fight them for cores.
  cv2.setNumThreads(0)


class TrainLoader(grain.DatasetIterator):
  """Endless batches; see `train_loader`. Orbax saves it like a grain iterator.

  The state is the number of rows that this process has read of the stream,
  good and bad, and so does not depend on threads and workers. On another
  number of processes the run goes on at the same place of the global stream.

  Attributes:
    rows_per_epoch: of all processes; the mean, if splits take turns.
  """

  def __init__(
    self,
    stream: grain.MapDataset,
    open_rows: Callable[[grain.MapDataset], grain.DatasetIterator],
    collate: Callable[[Sequence[Any]], examples.Arrays],
    batch_size: int,
    shard: tuple[int, int],
    epoch_lengths: Sequence[int],
    bad_samples: rejects.BadSamples,
  ):
    super().__init__()
    index, self._process_count = shard
    self._stream = stream[index :: self._process_count]
    self._open_rows = open_rows
    self._collate = collate
    self._batch_size = batch_size
    self.rows_per_epoch = sum(epoch_lengths) / len(epoch_lengths)
    self._num_rows = sum(epoch_lengths)
    self._bad_samples = bad_samples
    self._next_index = 0
    self._rows: grain.DatasetIterator | None = None

  def __next__(self) -> Batch:
    self._assert_not_closed()
    self.start_prefetch()
    good = []
    while len(good) < self._batch_size:
      row = next(self._rows)
      self._next_index += 1
      if not self._bad_samples.count(row):
        good.append(row)
    return _batch(self._collate, good, [True] * len(good))

  def start_prefetch(self) -> None:
    if self._rows is None:
      self._rows = self._open_rows(self._stream[self._next_index :])
      self._rows.start_prefetch()

  def get_state(self) -> dict[str, int]:
    return {
      "next_index": self._next_index,
      "process_count": self._process_count,
      "num_rows": self._num_rows,
    }

  def set_state(self, state: dict[str, int]) -> None:
    if state["num_rows"] != self._num_rows:
      logging.warning(
        "The data has %d rows now and had %d: its order is another one.",
        self._num_rows,
        state["num_rows"],
      )
    self._close_rows()
    position = state["next_index"] * state["process_count"]
    self._next_index = position // self._process_count

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
  """Return an iterator over endless batches: (arrays, ids of the rows).

  Batches hold what `example` makes of a record, stacked, and `valid`, which is
  all true. The rows of global batch k are the same for every number of
  processes (as long as no row is bad). `close()` it to end its threads.

  Args:
    example: from a record and a generator to arrays; a function of both alone.
      What it raises but for `BadSample` ends the run, with the id of the row.
    batch_size: rows per process.
    weights: see `order.picks`, as for `rotate`.
    num_workers: processes that prepare examples; 0 means threads alone.
    num_threads: in each of those processes.
  """
  epoch_lengths = order.epoch_lengths(sources, rotate)
  if not sum(epoch_lengths):
    raise ValueError("config.data: there is nothing to train on.")
  picks = order.picks(sources, seed=seed, weights=weights, rotate=rotate)
  # Position and seed make the generator, before the stream is dealt out to
  # processes: how many they are changes no augmentation.
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
    batch_size,
    (process_index, process_count),
    epoch_lengths=epoch_lengths,
    bad_samples=bad_samples or rejects.BadSamples(),
  )


class EvalLoader:
  """Batches of every row of a source, once; see `eval_loader`."""

  def __init__(
    self,
    source: Any,
    example: examples.Example,
    batch_size: int,
    shard: tuple[int, int],
    num_threads: int,
    bad_samples: rejects.BadSamples,
  ):
    self._index, process_count = shard
    self._global_batch = batch_size * process_count
    self._num_rows = len(source)
    self._example = example
    self._prepare = _Prepare((source,), example)
    self._batch_size = batch_size
    self._num_threads = num_threads
    self._bad_samples = bad_samples

  def __len__(self) -> int:
    return -(-self._num_rows // self._global_batch)

  def __iter__(self) -> Iterator[Batch]:
    stream = grain.MapDataset.range(len(self) * self._batch_size).map(self._at)
    rows = _read_ahead(stream, self._batch_size, 0, self._num_threads)
    try:
      for _ in range(len(self)):
        yield self._batch(list(itertools.islice(rows, self._batch_size)))
    finally:
      rows.close()
    self._bad_samples.judge()

  def _at(self, place: int) -> Any:
    """The row of one place in the batches of this process."""
    batch, slot = divmod(place, self._batch_size)
    row = batch * self._global_batch + self._index * self._batch_size + slot
    return self._row(row) if row < self._num_rows else _PADDING

  def _row(self, row: int) -> Any:
    # By row, not by place: the same for every batch size and process count.
    return self._prepare((0, row), np.random.default_rng(row))

  def _batch(self, rows: list[Any]) -> Batch:
    valid = [
      row is not _PADDING and not self._bad_samples.count(row) for row in rows
    ]
    filled = [
      row if good else (row.id, self._example.blank())
      for row, good in zip(rows, valid, strict=True)
    ]
    return _batch(self._example.collate, filled, valid)


# Fills the last batches; its id is empty.
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
  """Return an iterable over every row once, in order: (arrays, ids).

  Global batch k holds rows k n to (k + 1) n - 1, of which each process has one
  block of `batch_size`; all processes have equally many batches. `valid` is
  False, and the arrays are zero, where a row cannot be used or there is none
  left (those have an empty id). The generator that `example` gets depends on
  the row alone.

  Raises:
    ValueError: at the end of a pass, if too many rows could not be used.
  """
  return EvalLoader(
    source,
    example,
    batch_size,
    (process_index, process_count),
    num_threads,
    bad_samples or rejects.BadSamples(),
  )


def _batch(
  collate: Callable[[Sequence[Any]], examples.Arrays],
  rows: Sequence[tuple[str, Any]],
  valid: Sequence[bool],
) -> Batch:
  arrays = collate([example for _, example in rows])
  return arrays | {"valid": np.array(valid)}, [id for id, _ in rows]
