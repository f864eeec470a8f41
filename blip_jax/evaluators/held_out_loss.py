"""The training loss on held-out rows."""

import collections
import logging
from collections.abc import Iterator

import jax
import numpy as np

from blip_jax.evaluators import base
from blip_jax.runtime import train_state
from blip_jax.tasks import base as tasks

log = logging.getLogger(__name__)


class HeldOutLoss:
  """The losses that the task reports, without dropout, averaged over batches.

  Only full batches count: ITC and ITM compare with the other rows of the batch,
  so that a smaller batch would be easier.
  """

  def __init__(self, split: base.Split, task: tasks.Task):
    self._split = split

    @jax.jit
    def metrics(state, batch, number):
      _, (_, metrics) = task.loss(
        task.clamp(state.params),
        state.momentum,
        batch,
        rng=jax.random.fold_in(jax.random.key(0), number),
        step=state.step,
        train=False,
      )
      return metrics

    self._metrics = metrics

  def run(self, state: train_state.TrainState) -> Iterator[tuple[str, float]]:
    values = collections.defaultdict(list)
    full = []
    for number, (batch, _) in enumerate(self._split.batches()):
      metrics = self._metrics(state, batch, number)
      full.append(bool(batch["valid"].all()))
      if full[-1]:
        for name, value in metrics.items():
          if "loss" in name or "nll" in name:
            values[name].append(float(value))
    if not all(full[:-1]) or not any(full):
      log.warning(
        "The held-out loss is of %d of %d batches: the others have fewer than "
        "%d rows that can be read (config.evals.batch_size)",
        sum(full),
        len(full),
        self._split.batch_size,
      )
    for name, batch_values in values.items():
      yield name, float(np.mean(batch_values))
