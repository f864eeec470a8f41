"""A decoder made ready for many small steps.

What all steps use is made once, before the first one.

Dimensions: I images, B texts, N image tokens, E image width, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from blip_jax.models import cache as cache_lib
from blip_jax.models import float8, layers, med, stack

# (next tokens, cache) -> (logits of the token after them, cache).
Extend = Callable[
  [Int[Array, "B n"], cache_lib.Cache],
  tuple[Float[Array, "B V"], cache_lib.Cache],
]


class Stepwise(NamedTuple):
  """A decoder of some images or questions, for programs with many steps.

  Attributes:
    extend: decodes the next tokens of texts.
    init_cache: (positions, texts of each image) -> an empty cache.
  """

  extend: Extend
  init_cache: Callable[[int, int], cache_lib.Cache]


def make(
  model: nn.Module,
  params: med.Params,
  states: Float[Array, "I N E"],
  encoder_mask: Int[Array, "I N"] | None = None,
) -> Stepwise:
  """Prepares a decoder; see `generation.generate` for the arguments.

  What all steps use is made once: matrices of single layers in the dtype of the
  products, and keys and values in the memory order and of a length that suits
  these. XLA would do that again in every step; the barriers keep it from
  undoing this.
  """
  once = jax.lax.optimization_barrier
  decoder = once(prepare(model, {"text_decoder": params["text_decoder"]}))
  apply: Callable[..., Any] = functools.partial(
    model.apply, {"params": decoder}
  )
  matrix = once(apply(method="output_matrix"))
  stored = once(
    jax.tree.map(
      lambda x: layers.pad(x.transpose(0, 2, 3, 1), -1, 8),
      apply(states, method="decoder_kv"),
    )
  )
  encoder_mask = _pad_mask(encoder_mask, states.shape, stored)

  def extend(ids, cache) -> Any:
    encoder_kv = jax.tree.map(lambda x: x.transpose(0, 3, 1, 2), stored)
    return apply(ids, cache, encoder_kv, encoder_mask, matrix, method="extend")

  def init_cache(num_positions: int, texts_per_image: int) -> Any:
    shape = states.shape[0], num_positions, texts_per_image
    return apply(*shape, method="init_cache")

  return Stepwise(extend, init_cache)


def prepare(model: nn.Module, params: med.Params) -> med.Params:
  """Parameters as the steps of `generation.generate` use them.

  It does so itself in every call; parameters that are used more often can be
  prepared before.
  """
  decoder = stack.unstack(params["text_decoder"])
  decoder = _cast_dense(decoder, model.config.med.dtype)
  return {**params, "text_decoder": decoder}


def _cast_dense(params: Any, dtype: str) -> Any:
  """Parameters with those of linear layers in the dtype of their products, in
  which those of `float8` are."""
  if isinstance(params, list):
    return [_cast_dense(x, dtype) for x in params]
  if not isinstance(params, dict):
    return params
  if float8.SCALE in params:
    return params
  if "kernel" in params:
    return {name: x.astype(dtype) for name, x in params.items()}
  return {name: _cast_dense(x, dtype) for name, x in params.items()}


def _pad_mask(
  mask: Int[Array, "I N"] | None, shape: tuple[Any, ...], stored: Any
) -> Int[Array, "I P"] | None:
  """Extends the mask of states to the padded length of keys and values.

  Args:
    mask: None stands for ones.
    shape: of the states, [I, N, E].
    stored: keys and values, [..., P].
  """
  num_images, length, _ = shape
  padded = jax.tree.leaves(stored)[0].shape[-1]
  if padded == length:
    return mask
  if mask is None:
    mask = jnp.ones((num_images, length), jnp.int32)
  return jnp.pad(mask, ((0, 0), (0, padded - length)))
