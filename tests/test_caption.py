"""Captioning: padding and the prompt in the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.models import blip
from blip_jax.tasks import caption
from tests import helpers

MODEL = blip.Blip(helpers.BLIP)
RNG = jax.random.key(0)


def make_caption_loss(prompt_length):
  task = caption.Caption(MODEL, prompt_length)
  params = helpers.init("caption", helpers.BLIP, RNG)
  return jax.jit(
    lambda batch: task.loss(
      params, None, batch, rng=RNG, step=jnp.int32(0), train=False
    )[0]
  )


def test_padding_does_not_change_the_loss():
  """Texts trimmed to the longest, or padded to a fixed length."""
  loss, batch = make_caption_loss(prompt_length=2), helpers.pair_batch()
  pad = functools.partial(np.pad, pad_width=((0, 0), (0, 9)))
  padded = {
    **batch,
    "input_ids": pad(batch["input_ids"]),
    "attention_mask": pad(batch["attention_mask"]),
  }
  np.testing.assert_allclose(loss(padded), loss(batch), rtol=1e-6)


def test_the_prompt_is_not_in_the_loss():
  """A text that consists of the prompt alone has no loss."""
  loss, batch = make_caption_loss(prompt_length=4), helpers.pair_batch()
  only_prompt = np.array(batch["attention_mask"])
  only_prompt[:, 4:] = 0
  assert loss({**batch, "attention_mask": only_prompt}) == 0
  assert loss(batch) > 0
