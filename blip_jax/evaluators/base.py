"""What the loop knows of an evaluator, and what evaluators share."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool

from blip_jax.config import Config
from blip_jax.data import examples, loader, rejects
from blip_jax.runtime import sharding, train_state
from blip_jax.tasks import base as tasks


@runtime_checkable
class Evaluator(Protocol):
  """Answers one question about a model, on one held-out split."""

  def run(self, state: train_state.TrainState) -> Iterator[tuple[str, float]]:
    """Yields (metric, value); the caller knows which split it is."""
    ...


@dataclasses.dataclass
class Split:
  """Held-out rows, and how to run a program over them on the mesh.

  Attributes:
    source: random access to records.
    example: record to model inputs, without augmentation.
    batch_size: rows per batch of all processes together.
    mesh: where programs run.
    bad_samples: takes note of rows that cannot be read.
  """

  source: Any
  example: examples.PairExample
  batch_size: int
  mesh: jax.sharding.Mesh
  bad_samples: rejects.BadSamples

  def __post_init__(self):
    # Every shard gets the same number of rows; the padding is masked anyway.
    self.batch_size = sharding.padded_batch_size(self.batch_size, self.mesh)

  def batches(
    self, example: examples.Example | None = None, source: Any = None
  ) -> Iterator[tuple[dict[str, jax.Array], list[str]]]:
    """Batches on the mesh, and the ids of this process's rows."""
    rows = loader.eval_loader(
      self.source if source is None else source,
      example or self.example,
      self.batch_size // jax.process_count(),
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      bad_samples=self.bad_samples,
    )
    with sharding.activate(self.mesh):
      for arrays, ids in rows:
        yield sharding.put_batch(arrays, self.mesh), ids

  def map(
    self,
    program: Callable[[dict[str, jax.Array]], Any],
    example: examples.Example | None = None,
    source: Any = None,
  ) -> tuple[Any, Bool[np.ndarray, " n"]]:
    """All rows of `program`, in order and on every host.

    Args:
      program: a jitted function of a batch; its outputs have a row per row.
      example: record to inputs, if not the split's.
      source: rows, if not the split's.

    Returns:
      Arrays of as many rows as the source, and which of them are valid: a row
      that could not be read is zeros.
    """
    chunks = []
    for batch, _ in self.batches(example, source):
      rows = program(batch), batch["valid"]
      chunks.append(multihost_utils.process_allgather(rows, tiled=True))
    number = len(self.source if source is None else source)
    join = lambda *parts: np.concatenate(parts)[:number]
    return jax.tree.map(join, *chunks)


@dataclasses.dataclass(frozen=True)
class Context:
  """What the evaluators of a split are built from.

  Attributes:
    name: of the split.
    settings: `config.evals.<name>`.
    config: of the run.
    task: the task that is evaluated.
    example: record to model inputs, without augmentation.
    mesh: where programs run.
    bad_samples: takes note of rows that cannot be read.
    workdir: where evaluators leave files.
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
    """The rows of an open source as a split."""
    return Split(
      source,
      self.example,
      self.config.evals.batch_size,
      self.mesh,
      self.bad_samples,
    )

  def file(self, name: str) -> str:
    """The path of a file in the workdir."""
    return os.path.join(self.workdir, name)


Build = Callable[[Context], list[Evaluator]]
# Evaluators by the name of their split.
Evaluators = dict[str, list[Evaluator]]


def run(
  evaluators: Evaluators, state: train_state.TrainState
) -> dict[str, float]:
  """All metrics, as `split/metric`."""
  return {
    f"{split}/{metric}": float(value)
    for split, of_split in evaluators.items()
    for evaluator in of_split
    for metric, value in evaluator.run(state)
  }
