"""The same programs without what this package does to be fast.

Keys and values of an image are projected for each text that attends to it, for
each beam, and in each pass of pre-training, as the original does.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from blip_jax.inference import scoring
from blip_jax.models import blip, families, med

from . import measure, programs
from .programs import Setup


class BeamwiseBlip(blip.Blip):
  """Projects and stores an image's keys and values for every beam."""

  def decoder_kv(self, states):
    return super().decoder_kv(jnp.repeat(states, programs.NUM_BEAMS, axis=0))

  def extend(
    self, input_ids, cache, encoder_kv, encoder_mask=None, matrix=None
  ):
    of_each = programs.NUM_BEAMS
    if len(input_ids) == len(cache.ancestors):
      # The prompt is decoded once for all beams.
      first = lambda x: x[::of_each]
      encoder_kv = jax.tree.map(first, encoder_kv)
    elif encoder_mask is not None:
      encoder_mask = jnp.repeat(encoder_mask, of_each, axis=0)
    return super().extend(input_ids, cache, encoder_kv, encoder_mask, matrix)


def caption(setup: Setup, batch_size: int) -> measure.Program:
  model = BeamwiseBlip(setup.config)
  return programs.captioning(model, setup, batch_size, programs.beam_search())


def filter(setup: Setup, batch_size: int) -> measure.Program:
  match, weights = matcher(setup), programs.params("itm", setup)
  encode = programs.scorer(setup).image_features
  pixels = jnp.asarray(programs.images(setup, batch_size))
  each = programs.TEXTS_PER_IMAGE
  texts = programs.texts(batch_size * each)

  def run() -> np.ndarray:
    embeds, _ = encode(weights, pixels)
    repeated = jnp.repeat(embeds, each, axis=0)
    return np.asarray(match(weights, repeated, *texts)).reshape(-1, each, 2)

  return measure.Program(batch_size, run)


def rerank(setup: Setup, batch_size: int) -> measure.Program:
  match, weights = matcher(setup), programs.params("itm", setup)
  embeds = programs.image_embeds(setup, batch_size)
  number, at_once = programs.CANDIDATES, scoring.TEXTS_AT_ONCE
  texts = programs.texts(number)

  def run() -> np.ndarray:
    logits = []
    for image in embeds:
      for begin in range(0, number, at_once):
        batch = [x[begin : begin + at_once] for x in texts]
        repeated = jnp.repeat(image[None], len(batch[0]), axis=0)
        logits.append(match(weights, repeated, *batch))
    return np.concatenate(logits).reshape(batch_size, number, 2)

  return measure.Program(batch_size * number, run)


def rank(setup: Setup, batch_size: int) -> measure.Program:
  """Reads the whole of each answer on the short list, in a batch of their own
  with a copy of the question's states for each."""
  every, _ = map(jnp.asarray, programs.answer_list())

  def score(model, weights, states, mask):
    apply = functools.partial(model.apply, {"params": weights})

    def logits(ids, is_token, copies):
      copied = [jnp.repeat(x, copies, axis=0) for x in (states, mask)]
      kv = apply(copied[0], method="decoder_kv")
      read = apply(ids, is_token, kv, encoder_mask=copied[1], method="decode")
      return read.logits()

    dec = jnp.full((len(states), 1), programs.BERT.dec)
    first = jax.nn.softmax(logits(dec, jnp.ones_like(dec), 1)[:, 0])
    _, index = jax.lax.top_k(first[:, every[:, 1]], programs.SHORT_LIST)
    ids = every[index.reshape(-1)]
    is_token = (ids != programs.BERT.pad).astype(jnp.int32)
    predicted = logits(ids, is_token, programs.SHORT_LIST)[:, :-1]
    nll = optax.softmax_cross_entropy_with_integer_labels(predicted, ids[:, 1:])
    return (nll * is_token[:, 1:]).sum(axis=1).reshape(index.shape)

  return programs.answering(setup, batch_size, score)


def matcher(setup: Setup) -> Any:
  """(weights, image tokens, ids, mask) of pairs -> their ITM logits."""
  return functools.partial(_match, families.build("itm", setup.config))


@functools.partial(jax.jit, static_argnums=0)
def _match(model: nn.Module, weights: med.Params, embeds, ids, mask):
  apply = functools.partial(model.apply, {"params": weights})
  return apply(ids, mask, apply(embeds, method="image_kv"), method="match")


def pretrain(setup: Setup, batch_size: int) -> measure.Program:
  return programs.Pretraining(setup, batch_size, _task()).step()


def pretrain_losses(setup: Setup, batch_size: int) -> measure.Program:
  run = programs.Pretraining(setup, batch_size, _task()).losses
  return measure.Program(batch_size, run)


@functools.cache
def _task() -> Any:
  # Imported here because it needs ml_collections.
  from blip_jax.tasks import losses, pretrain

  class PassByPass(pretrain.Pretrain):
    """ITM projects the image of each of its pairs; LM projects them again."""

    def itm(
      self, run, params, image_embeds, image_kv, ids, mask, negatives
    ) -> Any:
      (neg_image, has_image), (neg_text, has_text) = negatives
      other_image = losses.take_in_group(image_embeds, neg_image)
      other = lambda x: losses.take_in_group(x, neg_text)
      embeds = jnp.concatenate([image_embeds, other_image, image_embeds])
      logits = run(
        params,
        "match",
        jnp.concatenate([ids, ids, other(ids)]),
        jnp.concatenate([mask, mask, other(mask)]),
        self.image_kv(params, embeds),
      )
      return losses.classification_loss(
        logits,
        jnp.repeat(jnp.array([1, 0, 0]), len(ids)),
        jnp.concatenate([jnp.ones_like(has_image), has_image, has_text]),
      )

  return PassByPass
