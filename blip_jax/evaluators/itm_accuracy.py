"""Image-text matching on true pairs and on mismatched ones."""

import dataclasses
import logging
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from blip_jax.data import sources
from blip_jax.evaluators import base, by_image
from blip_jax.runtime import train_state
from blip_jax.tasks import base as tasks

log = logging.getLogger(__name__)


class ItmAccuracy:
  """Accuracy of the ITM head, `itm_acc` in percent; half of the pairs are true.

  The wrong text of an image is that of the image half a batch away, because
  neighbours in a file often look alike. Images are in the order of their names
  and each has its captions in alphabetical order, so that the accuracy does not
  depend on the order of rows.
  """

  def __init__(self, split: base.Split, task: tasks.Task):
    images = split.by_image
    self._split = dataclasses.replace(images, source=_Sorted(images.source))
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
      predicted = jnp.argmax(match(params, ids, mask, image_kv), axis=-1)
      right = predicted.reshape(-1, 2) == jnp.array([[1, 0]])
      return right, (ids[0::2] != ids[1::2]).any(axis=-1)

    self._correct = correct

  def run(self, state: train_state.TrainState) -> Iterator[tuple[str, float]]:
    program = lambda batch: self._correct(state.params, batch)
    (right, differs), valid = self._split.map(program)
    true_pairs = right[valid, 0]
    wrong_pairs = right[valid & differs, 1]
    if not len(wrong_pairs):
      # No error: a split like this must not end a training run of days.
      log.warning("All texts of each batch are the same: itm_acc is left out.")
      return
    yield "itm_acc", float(50.0 * (true_pairs.mean() + wrong_pairs.mean()))


class _Sorted:
  """Images in the order of their names, each with sorted captions; rows that
  cannot be used follow."""

  def __init__(self, source: by_image.ByImage):
    order = sorted(source.images, key=lambda row: _name(source[row]))
    bad = sorted({*range(len(source))} - {*order})
    self._rows = sources.Rows(source, np.array([*order, *bad], int))

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> sources.Record:
    record = self._rows[index]
    as_bytes = lambda x: x.encode(errors="replace") if isinstance(x, str) else x
    return record | {"caption": sorted(record["caption"], key=as_bytes)}


def _name(record: sources.Record) -> list[tuple[int, str]]:
  """The name of an image, with numbers in it in the order of numbers."""
  _, name = sources.image_keys(record)[-1]
  parts = re.split(r"([0-9]+)", name)
  return [(int(p), "") if p.isdecimal() else (-1, p) for p in parts]


def _half_a_batch_away(valid: Bool[Array, " B"]) -> Int[Array, " B"]:
  """For each row, the row half a batch away, counting valid rows only."""
  num_valid = jnp.maximum(valid.sum(), 1)
  row_of_rank = jnp.argsort(~valid, stable=True)
  rank = jnp.cumsum(valid) - 1
  return row_of_rank[(rank + jnp.maximum(num_valid // 2, 1)) % num_valid]
