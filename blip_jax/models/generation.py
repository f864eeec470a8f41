"""Writing text with a decoder, one compiled program for all steps.

Dimensions: B texts, P prompt length, L maximal length, V vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from blip_jax.models import med

Extend = Callable[
  [Int[Array, "B n"], med.Cache], tuple[Float[Array, "B V"], med.Cache]
]


def greedy(
  extend: Extend,
  cache: med.Cache,
  prompt: Int[Array, "B P"],
  max_length: int,
  sep_id: int,
  pad_id: int,
) -> Int[Array, "B L"]:
  """Takes the likeliest token until [SEP] or `max_length`.

  Args:
    extend: scores of the token after the given ones, and the longer cache.
    cache: empty, with room for `max_length` tokens.
    prompt: the first tokens, the same number for every text.
    max_length: prompt included, as in the original.
    sep_id: ends a text.
    pad_id: fills up what comes after [SEP].
  """
  batch_size, prompt_length = prompt.shape
  ids = jnp.full((batch_size, max_length), pad_id, jnp.int32)
  ids = ids.at[:, :prompt_length].set(prompt)
  logits, cache = extend(prompt, cache)

  def unfinished(carry):
    _, position, done, _, _ = carry
    return (position < max_length) & ~done.all()

  def write(carry):
    ids, position, done, logits, cache = carry
    token = jnp.where(done, pad_id, jnp.argmax(logits, axis=-1))
    token = token.astype(jnp.int32)
    ids = jax.lax.dynamic_update_slice(ids, token[:, None], (0, position))
    done = done | (token == sep_id)
    logits, cache = extend(token[:, None], cache)
    return ids, position + 1, done, logits, cache

  done = jnp.zeros(batch_size, bool)
  position = jnp.int32(prompt_length)
  carry = (ids, position, done, logits, cache)
  return jax.lax.while_loop(unfinished, write, carry)[0]
