"""Text tower: one BERT that encodes, looks at images, or writes.

The mode is in the arguments, not in the weights (paper section 3.1):
  text        no `encoder_kv`, both directions: features for ITC
  multimodal  with `encoder_kv`, both directions: ITM
  decoder     with `encoder_kv`, `causal=True` or a `cache`: LM

Dimensions: B texts, I images (B is a multiple of I: texts b*B/I and on look at
image b; J images are I single ones or I pairs), m texts of an image under way,
L text length, N image tokens, D width, V vocabulary, H heads of d, P places.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Float, Int

from blip_jax.models import config as model_config
from blip_jax.models import layers

Params = dict
# Keys and values of every layer's cross-attention: of one image, or of two.
EncoderKV = tuple[layers.KV | tuple[layers.KV, layers.KV], ...]


class Cache(NamedTuple):
  """Self-attention keys and values of the tokens decoded so far.

  The texts of an image lie side by side, and share what they see: a beam that
  goes on from another takes over its ancestors, and no key is moved.

  Attributes:
    kv: a pair of [I, H, P, m, d] a layer, of which the first `length` of P
      places are written.
    ancestors: which of the m texts wrote the token that a text has at a place.
    length: of the texts so far.
  """

  kv: tuple[tuple[Array, Array], ...]
  ancestors: Int[Array, "I m P"]
  length: Int[Array, ""]


def look_at_one(config: model_config.MedConfig, index: int) -> nn.Module:
  """Cross-attention of layer `index` to one image."""
  return _attention(config)


class Med(nn.Module):
  """`cross_attention` makes that block of a layer; NLVR has another."""

  config: model_config.MedConfig
  with_lm_head: bool = False
  cross_attention: Callable[..., nn.Module] = look_at_one

  def setup(self):
    c = self.config
    normal = nn.initializers.normal(c.init_std)
    self.word_embeddings = self.param(
      "word_embeddings", normal, (c.vocab_size, c.width)
    )
    self.position_embeddings = self.param(
      "position_embeddings", normal, (c.max_positions, c.width)
    )
    self.ln_embed = layer_norm(c.dtype)
    self.drop = nn.Dropout(c.dropout)
    layer = layers.remat(Layer, c.remat, 7)
    self.layers = [
      layer(c, i, self.cross_attention, name=f"layer_{i}")
      for i in range(c.depth)
    ]
    if self.with_lm_head:
      self.lm_head = LMHead(c)

  def __call__(
    self,
    input_ids: Int[Array, "B L"],
    attention_mask: Int[Array, "B L"],
    encoder_kv: EncoderKV | None = None,
    encoder_mask: Int[Array, "I N"] | None = None,
    causal: bool = False,
    deterministic: bool = True,
  ) -> Float[Array, "B L D"]:
    """Hidden states of the last layer."""
    bias = (1.0 - attention_mask[:, None, None, :]) * -10000.0
    if causal:
      length = input_ids.shape[1]
      visible = jnp.tril(jnp.ones((length, length), bool))[None, None]
      bias = jnp.where(visible, bias, -10000.0)
    x = self._embed(input_ids, jnp.arange(input_ids.shape[1]), deterministic)
    encoder_bias = _encoder_bias(encoder_mask)
    for i, layer in enumerate(self.layers):
      cross = encoder_kv[i] if encoder_kv is not None else None
      x, _ = layer(x, bias, cross, encoder_bias, None, None, deterministic)
    return x

  def extend(
    self,
    input_ids: Int[Array, "B L"],
    cache: Cache,
    encoder_kv: EncoderKV | None = None,
    encoder_mask: Int[Array, "I N"] | None = None,
  ) -> tuple[Float[Array, "B L D"], Cache]:
    """Decodes the next L tokens of all texts, or those that an image's texts
    have in common (B = I); the cache must have room for them."""
    length = input_ids.shape[1]
    positions = cache.length + jnp.arange(length)
    num_writers = len(input_ids) // len(cache.ancestors)
    cache = _adopt(cache, num_writers, length)
    bias = _cache_bias(cache, num_writers, positions)
    x = self._embed(input_ids, positions, deterministic=True)
    encoder_bias = _encoder_bias(encoder_mask)
    kv = []
    for i, layer in enumerate(self.layers):
      cross = encoder_kv[i] if encoder_kv is not None else None
      x, layer_kv = layer(
        x, bias, cross, encoder_bias, cache.kv[i], cache.length, True
      )
      kv.append(layer_kv)
    return x, Cache(tuple(kv), cache.ancestors, cache.length + length)

  def init_cache(
    self, num_images: int, max_length: int, num_texts: int = 1
  ) -> Cache:
    """Room for `num_texts` texts of each image."""
    c = self.config
    head = c.width // c.num_heads
    shape = (num_images, c.num_heads, max_length, num_texts, head)
    empty = jnp.zeros(shape, c.dtype)
    ancestors = jnp.zeros((num_images, num_texts, max_length), jnp.int32)
    return Cache(((empty, empty),) * c.depth, ancestors, jnp.int32(0))

  def project_encoder_states(self, states: Float[Array, "J N E"]) -> EncoderKV:
    """What every layer's cross-attention needs of the images, once."""
    return tuple(layer.project_encoder_states(states) for layer in self.layers)

  def logits(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
    """Next-token scores in float32."""
    return self.lm_head(hidden, self.word_embeddings)

  def _embed(self, input_ids, positions, deterministic):
    if input_ids.shape[1] > self.config.max_positions:
      # An out-of-range lookup would silently repeat the last position.
      raise ValueError(
        f"texts of {input_ids.shape[1]} tokens: this model has only "
        f"{self.config.max_positions} positions; truncate them"
      )
    x = self.word_embeddings[input_ids]
    x = self.ln_embed(x + self.position_embeddings[positions][None])
    return self.drop(x, deterministic=deterministic)


class Layer(nn.Module):
  """A post-norm BERT layer with cross-attention between its two halves."""

  config: model_config.MedConfig
  index: int
  cross_attention: Callable[..., nn.Module]

  def setup(self):
    c = self.config
    self.attention = _attention(c)
    self.crossattention = self.cross_attention(c, self.index)
    self.fc_in = layers.normal_dense(c.mlp_dim, c)
    self.fc_out = layers.normal_dense(c.width, c)
    self.ln = layer_norm(c.dtype)
    self.drop = nn.Dropout(c.dropout)

  def __call__(
    self, x, bias, encoder_kv, encoder_bias, cache, cache_length, deterministic
  ):
    x = nn.with_logical_constraint(x, ("batch", "seq", None))
    kv = self.attention.project(x)
    if cache is not None:
      cache = jax.tree.map(
        lambda old, new: _write(old, new, cache_length), cache, kv
      )
      kv = jax.tree.map(_side_by_side, cache)
    x = self.attention(x, kv, bias, deterministic)
    if encoder_kv is not None:
      x = self.crossattention(x, encoder_kv, encoder_bias, deterministic)
    y = self.fc_out(nn.gelu(self.fc_in(x), approximate=False))
    return self.ln(x + self.drop(y, deterministic=deterministic)), cache

  def project_encoder_states(self, states):
    return self.crossattention.project(states)


class PostNormAttention(layers.Attention):
  """Attention, residual and LayerNorm: one block, and one unit of tying."""

  def setup(self):
    super().setup()
    self.ln = layer_norm(self.dtype)

  def __call__(self, x, kv, bias=None, deterministic=True):
    y = super().__call__(x, kv, bias, deterministic)
    return self.ln(x + self.drop(y, deterministic=deterministic))


class LMHead(nn.Module):
  """BERT's prediction head; its matrix is the word embedding itself."""

  config: model_config.MedConfig

  @nn.compact
  def __call__(
    self,
    hidden: Float[Array, "B L D"],
    word_embeddings: Float[Array, "V D"],
  ) -> Float[Array, "B L V"]:
    c = self.config
    x = layers.normal_dense(c.width, c, "transform")(hidden)
    x = layer_norm(c.dtype, name="ln")(nn.gelu(x, approximate=False))
    bias = self.param("bias", nn.initializers.zeros, (c.vocab_size,))
    scores = jnp.einsum(
      "bld,vd->blv",
      x,
      word_embeddings.astype(x.dtype),
      preferred_element_type=jnp.float32,
    )
    return scores + bias[None, None]


def _attention(c: model_config.MedConfig) -> PostNormAttention:
  return PostNormAttention(c.width, c.num_heads, c.dropout, c.init_std, c.dtype)


def layer_norm(dtype: str, name: str | None = None) -> nn.LayerNorm:
  # E[x^2] - E[x]^2 cancels at BERT's tiny epsilon; subtract the mean first.
  return nn.LayerNorm(
    epsilon=1e-12, dtype=dtype, use_fast_variance=False, name=name
  )


def begin_with(token: int, input_ids: Int[Array, "B L"]) -> Int[Array, "B L"]:
  """Puts the token that says what a text is for at position 0."""
  return input_ids.at[:, 0].set(token)


def tie(params: Params) -> Params:
  """Fills the decoder with what pre-training shares (paper, Table 3).

  Encoder and decoder are one network but for self-attention: embeddings,
  cross-attention and feed-forward are the encoder's, while the decoder owns its
  self-attention (LayerNorm included) and its head.
  """
  encoder = traverse_util.flatten_dict(params["text_encoder"])
  decoder = traverse_util.flatten_dict(params["text_decoder"])
  shared = {path: x for path, x in encoder.items() if is_shared(path)}
  tied = traverse_util.unflatten_dict({**shared, **decoder})
  return {**params, "text_decoder": tied}


def drop_tied(params: Params) -> Params:
  """What pre-training stores, optimises and counts; the inverse of `tie`."""
  decoder = traverse_util.flatten_dict(params["text_decoder"])
  own = {path: x for path, x in decoder.items() if not is_shared(path)}
  return {**params, "text_decoder": traverse_util.unflatten_dict(own)}


def is_shared(path: tuple[str, ...]) -> bool:
  """Whether pre-training's text towers share the parameter at this path."""
  return "attention" not in path and "lm_head" not in path


def _encoder_bias(mask):
  if mask is None:
    return None
  return (1.0 - mask[:, None, None, :]) * -1e9


def _adopt(cache: Cache, num_writers: int, length: int) -> Cache:
  """With the texts that write the next tokens as ancestors there."""
  num_images, num_texts, _ = cache.ancestors.shape
  writer = jnp.arange(num_texts) % num_writers
  writer = jnp.broadcast_to(writer[:, None], (num_images, num_texts, length))
  ancestors = jax.lax.dynamic_update_slice_in_dim(
    cache.ancestors, writer, cache.length, axis=2
  )
  return cache._replace(ancestors=ancestors)


def _cache_bias(
  cache: Cache, num_writers: int, positions: Int[Array, " L"]
) -> Float[Array, "I 1 Q N"]:
  """Hides the tokens of others, and those behind `positions`."""
  num_images, num_texts, places = cache.ancestors.shape
  own = jax.nn.one_hot(cache.ancestors[:, :num_writers], num_texts, dtype=bool)
  before = jnp.arange(places)[None] <= positions[:, None]
  visible = own[:, :, None] & before[None, None, :, :, None]
  bias = jnp.where(visible, 0.0, -10000.0)
  return bias.reshape(num_images, 1, -1, places * num_texts)


def _write(cache, new, position):
  """Puts the next keys or values, [B, L, H, d], behind the others."""
  new = new.reshape(len(cache), -1, *new.shape[1:]).transpose(0, 3, 2, 1, 4)
  return jax.lax.dynamic_update_slice_in_dim(cache, new, position, axis=2)


def _side_by_side(cache):
  """The keys or values of all texts of an image, as attention takes them."""
  num_images, num_heads, *_, head = cache.shape
  return cache.reshape(num_images, num_heads, -1, head).transpose(0, 2, 1, 3)
