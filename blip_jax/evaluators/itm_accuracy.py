"""Image-text matching on true pairs and on random ones."""

import logging
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from blip_jax.evaluators import base
from blip_jax.runtime import train_state
from blip_jax.tasks import base as tasks

log = logging.getLogger(__name__)


class ItmAccuracy:
  """Accuracy of the ITM head when half of the pairs are true.

  The wrong text of a picture is that of the row half a batch away, for
  neighbours in a file are often captions of one picture.
  """

  def __init__(self, split: base.Split, task: tasks.Task):
    self._split = split
    features = task.predict_fns["image_features"]
    project = task.predict_fns["image_kv"]
    match = task.predict_fns["match"]

    @jax.jit
    def correct(params, batch):
      image_embeds, _ = features(params, batch["image"])
      partner = _half_a_batch_away(batch["valid"])
      both = lambda x: jnp.stack([x, x[partner]], axis=1).reshape(
        -1, x.shape[-1]
      )
      ids, mask = both(batch["input_ids"]), both(batch["attention_mask"])
      image_kv = project(params, image_embeds)
      says_match = jnp.argmax(match(params, ids, mask, image_kv), axis=-1)
      right = says_match.reshape(-1, 2) == jnp.array([[1, 0]])
      return right, (ids[0::2] != ids[1::2]).any(axis=-1)

    self._correct = correct

  def run(self, state: train_state.TrainState) -> Iterator[tuple[str, float]]:
    program = lambda batch: self._correct(state.params, batch)
    (right, differs), valid = self._split.map(program)
    true_pairs = right[valid, 0]
    random_pairs = right[valid & differs, 1]
    if not len(random_pairs):
      # A run of days must not end over the split it is measured on.
      log.warning("No two texts differ in a batch: itm_acc is left out.")
      return
    yield "itm_acc", 50.0 * (true_pairs.mean() + random_pairs.mean())


def _half_a_batch_away(valid: Bool[Array, " B"]) -> Int[Array, " B"]:
  """The row to borrow from, counting valid rows only."""
  number = jnp.maximum(valid.sum(), 1)
  row_of_rank = jnp.argsort(~valid, stable=True)
  rank = jnp.cumsum(valid) - 1
  return row_of_rank[(rank + jnp.maximum(number // 2, 1)) % number]
