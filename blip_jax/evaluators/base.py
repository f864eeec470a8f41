"""The interface of evaluators, and what they share."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool

from blip_jax.data import examples, loader, rejects, sources, transforms
from blip_jax.evaluators import by_image, result_file
from blip_jax.runtime import sharding, train_state
from blip_jax.runtime.config import Config
from blip_jax.tasks import base as tasks

log = logging.getLogger(__name__)


@runtime_checkable
class Evaluator(Protocol):
  """Answers one question about a model, on one held-out split."""

  def run(self, state: train_state.TrainState) -> Iterator[tuple[str, float]]:
    """Yields (metric, value); the caller adds the name of the split."""
    ...


@dataclasses.dataclass
class Split:
  """Held-out rows, and a way to run a program over them on the mesh.

  Attributes:
    source: random access to records.
    example: record -> model inputs, without augmentation, as the task makes
      them; what evaluators of image-text pairs take is a `PairExample`.
    batch_size: rows per batch, of all processes together; rounded up to what
      the mesh can divide.
    mesh: where programs run.
    bad_samples: counts rows that cannot be read.
  """

  source: Any
  example: Any
  batch_size: int
  mesh: jax.sharding.Mesh
  bad_samples: rejects.BadSamples

  def __post_init__(self):
    # Every shard gets the same number of rows; padding is not valid.
    self.batch_size = sharding.padded_batch_size(self.batch_size, self.mesh)

  @functools.cached_property
  def by_image(self) -> "Split":
    """The split with one row for each image; see `by_image.ByImage`."""
    if isinstance(self.source, by_image.ByImage):
      return self
    return dataclasses.replace(self, source=by_image.ByImage(self.source))

  def image_example(self, num_frames: int = 0) -> examples.ImageExample:
    """The images of records alone; of videos, `num_frames` frames."""
    image = self.example.image
    assert isinstance(image, transforms.EvalImage)
    return examples.ImageExample(image, num_frames=num_frames)

  def batches(
    self, example: examples.Example | None = None, source: Any = None
  ) -> Iterator[tuple[dict[str, jax.Array], list[str]]]:
    """Yields batches on the mesh, and the ids of this process's rows.

    Args:
      example: record -> inputs; by default the split's.
      source: of rows; by default the split's.
    """
    batches = loader.eval_loader(
      self.source if source is None else source,
      example or self.example,
      self.batch_size // jax.process_count(),
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      bad_samples=self.bad_samples,
    )
    with sharding.activate(self.mesh):
      for arrays, ids in batches:
        yield sharding.put_batch(arrays, self.mesh), ids

  def map(
    self,
    program: Callable[[dict[str, jax.Array]], Any],
    example: examples.Example | None = None,
    source: Any = None,
  ) -> tuple[Any, Bool[np.ndarray, " n"]]:
    """Runs a program over all rows; every process gets all results.

    Args:
      program: a jitted function of a batch, whose outputs have one row for
        each row of the batch.
      example: record -> inputs; by default the split's.
      source: of rows; by default the split's.

    Returns:
      The outputs, in order of the source's rows, and which rows are valid. The
      output of a row that could not be read is meaningless.
    """
    chunks = []
    for batch, _ in self.batches(example, source):
      rows = program(batch), batch["valid"]
      chunks.append(multihost_utils.process_allgather(rows, tiled=True))
    num_rows = len(self.source if source is None else source)
    join = lambda *parts: np.concatenate(parts)[:num_rows]
    return jax.tree.map(join, *chunks)

  def distinct(
    self, valid: Bool[np.ndarray, " n"], key: str
  ) -> dict[Any, tuple[int, sources.Record]]:
    """Returns rows that are valid, with their records, by ids.

    Of rows with one id the first counts; the log says how many others there
    are.

    Args:
      valid: which rows are.
      key: of records, for their ids, such as "question_id".
    """
    found = {}
    for row in np.flatnonzero(valid).tolist():
      record = self.source[row]
      found.setdefault(record[key], (row, record))
    if repeated := int(valid.sum()) - len(found):
      what = key.removesuffix("_id")
      log.warning("%d rows repeat the id of a %s", repeated, what)
    return found


@dataclasses.dataclass(frozen=True)
class Context:
  """Everything that the evaluators of a split are built from.

  Attributes:
    name: of the split.
    settings: `config.evals.<name>`.
    config: of the run.
    task: to evaluate.
    example: record -> model inputs, without augmentation.
    mesh: where programs run.
    bad_samples: counts rows that cannot be read.
    workdir: where evaluators write files.
  """

  name: str
  settings: Config
  config: Config
  task: tasks.Task
  example: examples.Example
  mesh: jax.sharding.Mesh
  bad_samples: rejects.BadSamples
  workdir: str

  def split(self, source: Any) -> Split:
    """Returns the rows of an open source as a split; logs their number, and
    lists those that cannot be used."""
    split = Split(
      source,
      self.example,
      self.config.evals.batch_size,
      self.mesh,
      self.bad_samples,
    )
    images = split.by_image.source
    log.info(
      "Split %s: %s images, %s captions, in %s rows",
      self.name,
      *(
        f"{n:,}" for n in (len(images.images), images.num_captions, len(source))
      ),
    )
    if images.bad:
      log.warning(
        "Split %s: %s rows or captions cannot be used",
        self.name,
        f"{len(images.bad):,}",
      )
    for bad in images.bad:
      split.bad_samples.note(bad)
    return split

  def file(self, name: str) -> result_file.ResultFile:
    """Returns a file in the workdir."""
    path = os.path.join(self.workdir, name)
    return result_file.ResultFile(path, required=self.config.job == "evaluate")


Build = Callable[[Context], list[Evaluator]]
# Evaluators, by the name of their split.
Evaluators = dict[str, list[Evaluator]]


def run(
  evaluators: Evaluators, state: train_state.TrainState
) -> dict[str, float]:
  """Returns all metrics, as `split/metric`."""
  return {
    f"{split}/{metric}": float(value)
    for split, split_evaluators in evaluators.items()
    for evaluator in split_evaluators
    for metric, value in evaluator.run(state)
  }
