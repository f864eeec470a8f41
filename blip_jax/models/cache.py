"""The cache of the text tower: keys and values of the tokens decoded so far.

Dimensions: I images, m texts of each, L text length, P positions of the cache,
H heads, d head width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Cache(NamedTuple):
  """Self-attention keys and values of the tokens decoded so far.

  Every text can attend to the keys of all m texts of its image; `ancestors`
  selects the right one at each position.  When a beam continues another one,
  only `ancestors` is copied, and no keys or values.

  Attributes:
    kv: for each stack of layers, (keys, values) of every layer, both
      [I, H, P, m, d], filled at the first `length` positions.
    ancestors: for each text and position, the index of the text under which
      the key and value of its token are stored.
    length: number of tokens decoded so far.
  """

  kv: tuple[Any, ...]
  ancestors: Int[Array, "I m P"]
  length: Int[Array, ""]


def add_positions(cache: Cache, texts_per_image: int, length: int) -> Cache:
  """Sets the ancestors of the next `length` positions.

  Each text is its own ancestor there, or, if the texts of an image share a
  prefix (`texts_per_image` is 1), the first one is everybody's.
  """
  num_images, num_texts, _ = cache.ancestors.shape
  text = jnp.arange(num_texts) % texts_per_image
  text = jnp.broadcast_to(text[:, None], (num_images, num_texts, length))
  ancestors = jax.lax.dynamic_update_slice_in_dim(
    cache.ancestors, text, cache.length, axis=2
  )
  return cache._replace(ancestors=ancestors)


def bias(
  cache: Cache, texts_per_image: int, positions: Int[Array, " L"]
) -> Float[Array, "I 1 Q N"]:
  """Masks the tokens of other texts, and tokens after `positions`."""
  num_images, num_texts, num_positions = cache.ancestors.shape
  ancestors = cache.ancestors[:, :texts_per_image, :, None]
  is_ancestor = ancestors == jnp.arange(num_texts)[None, None, None]
  causal = jnp.arange(num_positions)[None] <= positions[:, None]
  visible = is_ancestor[:, :, None] & causal[None, None, :, :, None]
  masked = jnp.where(visible, 0.0, -10000.0)
  return masked.reshape(num_images, 1, -1, num_positions * num_texts)


def append(cache, new, position):
  """Stores new keys or values, [B, L, H, d], from `position` on."""
  new = new.reshape(cache.shape[0], -1, *new.shape[1:]).transpose(0, 3, 2, 1, 4)
  return jax.lax.dynamic_update_slice_in_dim(cache, new, position, axis=2)


def merge_texts(cache):
  """Keys or values of all texts of an image as one sequence, for attention:
  [I, H, P, m, d] -> [I, P * m, H, d]."""
  num_images, num_heads, *_, head = cache.shape
  return cache.reshape(num_images, num_heads, -1, head).transpose(0, 2, 1, 3)
