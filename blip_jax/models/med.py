"""Text tower: a BERT that encodes text, alone or with an image, and decodes.

The arguments select the mode, not the weights (paper, section 3.1):
  text        no `encoder_kv`, bidirectional: features for ITC
  multimodal  with `encoder_kv`, bidirectional: ITM
  decoder     with `encoder_kv`, `causal=True` or a `cache`: LM

Dimensions: B texts, I images (B is a multiple of I, and the B / I texts from
i * B / I on attend to image i), J images (I single ones, or I pairs), m texts
decoded for each image, L text length, N image tokens, D width, E image width,
V vocabulary, W rows of its padded matrix, P positions of the cache.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import spmd
from jaxtyping import Array, Float, Int

from blip_jax.models import cache as cache_lib
from blip_jax.models import config as model_config
from blip_jax.models import initial, layers, predictions, stack

Params = dict
# Keys and values for the cross-attention of each stack of layers: those of one
# image or of two, stacked as the layers are.
EncoderKV = tuple[Any, ...]


class Stack(NamedTuple):
  """Some consecutive layers of the tower.

  Attributes:
    name: of their parameters, one of `stack.NAMES`.
    depth: number of layers.
    cross_attention: module of each layer's cross-attention, of the config.
  """

  name: str
  depth: int
  cross_attention: Callable[[model_config.MedConfig], nn.Module]


def one_image_stacks(config: model_config.MedConfig) -> tuple[Stack, ...]:
  """Layers that attend to one image."""
  return (Stack("layers", config.depth, _attention),)


class Med(nn.Module):
  """The text tower.

  Attributes:
    config: its sizes.
    encoder_width: E, width of the states that it attends to.
    with_lm_head: whether it can predict tokens.
    stacks: its layers; NLVR uses `nlvr.two_image_stacks`.
  """

  config: model_config.MedConfig
  encoder_width: int
  with_lm_head: bool = False
  stacks: Callable[[model_config.MedConfig], tuple[Stack, ...]] = (
    one_image_stacks
  )

  def setup(self):
    c = self.config
    normal = initial.normal(c.init_std)
    self.word_embeddings = self.param(
      "word_embeddings", normal, (c.vocab_size, c.width)
    )
    self.position_embeddings = self.param(
      "position_embeddings", normal, (c.max_positions, c.width)
    )
    self.ln_embed = layer_norm(c.dtype)
    for layer, part in self._stacks():
      states = jnp.zeros((2, 1, self.encoder_width))
      start = functools.partial(layer.init, states=states, method="start")
      stack.declare(self, part.name, part.depth, start)
    if self.with_lm_head:
      self.lm_head = LMHead(c)

  def _stacks(self) -> list[tuple["Layer", Stack]]:
    return [
      (Layer(self.config, part.cross_attention, parent=None), part)
      for part in self.stacks(self.config)
    ]

  def _parts(self) -> list[tuple["Layer", stack.Layers]]:
    """The module and the parameters of the layers of each stack."""
    return [
      (layer, stack.params(self, part.name)) for layer, part in self._stacks()
    ]

  def __call__(
    self,
    input_ids: Int[Array, "B L"],
    attention_mask: Int[Array, "B L"],
    encoder_kv: EncoderKV | None = None,
    encoder_mask: Int[Array, "I N"] | None = None,
    causal: bool = False,
    deterministic: bool = True,
  ) -> Float[Array, "B L D"]:
    """Encodes, or decodes all positions at once.

    Args:
      input_ids: tokens.
      attention_mask: 1 on tokens, 0 on padding.
      encoder_kv: keys and values of the images, from `encoder_kv`.
      encoder_mask: 1 on image tokens to attend to; all of them by default.
      causal: whether a token attends only to itself and the ones before it.
      deterministic: disables dropout.

    Returns:
      Hidden states of the last layer.

    Raises:
      ValueError: L exceeds the number of position embeddings.
    """
    bias = (1.0 - attention_mask[:, None, None, :]) * -10000.0
    if causal:
      length = input_ids.shape[1]
      visible = jnp.tril(jnp.ones((length, length), bool))[None, None]
      bias = jnp.where(visible, bias, -10000.0)
    x = self._embed(input_ids, jnp.arange(input_ids.shape[1]), deterministic)
    encoder_bias = _encoder_bias(encoder_mask)
    drops = not deterministic and self.config.dropout > 0
    for i, (layer, params) in enumerate(self._parts()):

      def apply(x, own, layer=layer, **kwargs):
        params, cross, gates, masks = own
        variables = {layers.MASKS: masks or {}, layers.GATES: gates or {}}
        return layer.apply(
          {"params": params, **variables},
          *(x, bias, cross, encoder_bias, None, None, not drops),
          **kwargs,
        )

      cross = encoder_kv[i] if encoder_kv is not None else None
      own = params, cross, self._gates(i)
      masks = self._masks(apply, x, own) if drops else None
      apply = layers.remat(apply, self.config.remat)
      x, _ = stack.run(apply, x, *own, masks)
    return x

  def _gates(self, i: int) -> Any:
    """Factors of the attention probabilities of a stack; None: all ones."""
    return self.get_variable(layers.GATES, self.stacks(self.config)[i].name)

  def _masks(self, apply: Callable, x: Any, own: tuple[Any, ...]) -> Any:
    """The masks of all layers that `apply` applies one of to `x`."""
    params, *_ = own
    one = lambda: apply(x, (*stack.first(own), None), mutable=[layers.MASKS])
    key, depth = self.make_rng("dropout"), stack.depth(params)
    return layers.sample_masks(key, self.config.dropout, depth, one)

  def extend(
    self,
    input_ids: Int[Array, "B L"],
    cache: cache_lib.Cache,
    encoder_kv: EncoderKV | None = None,
    encoder_mask: Int[Array, "I N"] | None = None,
  ) -> tuple[Float[Array, "B L D"], cache_lib.Cache]:
    """Decodes the next L tokens after those in the cache.

    Args:
      input_ids: the tokens of all texts (B = I * m), or a prefix that all texts
        of an image share (B = I).
      cache: with at least L free positions.
      encoder_kv: keys and values of the images, from `encoder_kv`.
      encoder_mask: 1 on image tokens to attend to; all of them by default.

    Returns:
      Hidden states of the last layer, and the cache with the new tokens.
    """
    length = input_ids.shape[1]
    positions = cache.length + jnp.arange(length)
    texts_per_image = input_ids.shape[0] // cache.ancestors.shape[0]
    cache = cache_lib.add_positions(cache, texts_per_image, length)
    bias = cache_lib.bias(cache, texts_per_image, positions)
    x = self._embed(input_ids, positions, deterministic=True)
    encoder_bias = _encoder_bias(encoder_mask)
    kv = []
    for i, (layer, params) in enumerate(self._parts()):

      def apply(x, own, layer=layer):
        params, cross, kv = own
        return layer.apply(
          {"params": params},
          *(x, bias, cross, encoder_bias, kv, cache.length, True),
        )

      cross = encoder_kv[i] if encoder_kv is not None else None
      x, layers_kv = stack.run(apply, x, params, cross, cache.kv[i])
      kv.append(layers_kv)
    return x, cache_lib.Cache(tuple(kv), cache.ancestors, cache.length + length)

  def init_cache(
    self, num_images: Any, max_length: int, num_texts: int = 1
  ) -> cache_lib.Cache:
    """An empty cache for `num_texts` texts of each image.

    Args:
      num_images: I; a symbol in an exported program.
      max_length: P, the most tokens that it can hold.
      num_texts: m.
    """
    c = self.config
    head = c.width // c.num_heads
    shape = (num_images, c.num_heads, max_length, num_texts, head)
    empty = jnp.zeros(shape, c.dtype)
    ancestors = jnp.zeros((num_images, num_texts, max_length), jnp.int32)
    kv = tuple(
      stack.like((empty, empty), params) for _, params in self._parts()
    )
    return cache_lib.Cache(kv, ancestors, jnp.int32(0))

  def encoder_kv(self, states: Float[Array, "J N E"]) -> EncoderKV:
    """Keys and values of image tokens for the cross-attention of all layers.

    Compute them once per image and share them between texts.
    """

    def of(layer: Layer, params: stack.Layers) -> Any:
      def apply(_, own):
        return None, layer.apply(
          {"params": own[0]}, states, method="encoder_kv"
        )

      return stack.run(apply, None, params)[1]

    return tuple(of(layer, params) for layer, params in self._parts())

  def predict(
    self,
    hidden: Float[Array, "B L D"],
    matrix: Float[Array, "W D"] | None = None,
  ) -> predictions.Predictions:
    """Predicts the next tokens.

    Args:
      hidden: of the last layer.
      matrix: from `output_matrix`, if that was called once for many tokens.
    """
    if matrix is None:
      matrix = self.output_matrix()
    return self.lm_head(hidden, matrix)

  def output_matrix(self) -> Float[Array, "W D"]:
    """See `predictions.output_matrix`."""
    return predictions.output_matrix(self.word_embeddings, self.config.dtype)

  def _embed(self, input_ids, positions, deterministic):
    if input_ids.shape[1] > self.config.max_positions:
      # JAX would clamp the index and silently reuse the last position.
      raise ValueError(
        f"texts of {input_ids.shape[1]} tokens: this model has only "
        f"{self.config.max_positions} positions; truncate them"
      )
    x = self.word_embeddings[input_ids]
    x = self.ln_embed(x + self.position_embeddings[positions][None])
    rate = self.config.dropout
    if deterministic or not rate:
      return x
    keep = layers.keep_mask(self.make_rng("dropout"), rate, x.shape)
    return layers.drop(x, keep, rate)


class Layer(nn.Module):
  """A post-norm BERT layer: self-attention, cross-attention, feed-forward."""

  config: model_config.MedConfig
  cross_attention: Callable[[model_config.MedConfig], nn.Module]

  def setup(self):
    c = self.config
    self.attention = _attention(c)
    self.crossattention = self.cross_attention(c)
    self.fc_in = layers.normal_dense(c.mlp_dim, c)
    self.fc_out = layers.normal_dense(c.width, c)
    self.ln = layer_norm(c.dtype)
    self.drop = layers.Dropout(c.dropout)

  def __call__(
    self, x, bias, encoder_kv, encoder_bias, cache, cache_length, deterministic
  ):
    x = spmd.with_logical_constraint(x, ("batch", "seq", None))
    kv = self.attention.key_value(x)
    if cache is not None:
      cache = jax.tree.map(
        lambda old, new: cache_lib.append(old, new, cache_length), cache, kv
      )
      kv = jax.tree.map(cache_lib.merge_texts, cache)
    x = self.attention(x, kv, bias, deterministic)
    if encoder_kv is not None:
      x = self.crossattention(x, encoder_kv, encoder_bias, deterministic)
    y = self.fc_out(layers.gelu(self.fc_in(x)))
    return self.ln(x + self.drop(y, deterministic=deterministic)), cache

  def encoder_kv(self, states):
    return self.crossattention.key_value(states)

  def start(self, states):
    """Uses all parameters, so that `init` creates them."""
    kv = self.encoder_kv(states)
    batch = jax.tree.leaves(kv)[0].shape[0]
    x = jnp.zeros((batch, 1, self.config.width))
    return self(x, None, kv, None, None, None, True)


class PostNormAttention(layers.Attention):
  """Attention with residual connection and LayerNorm.

  One module, because pre-training ties or keeps all of it together.
  """

  def setup(self):
    super().setup()
    self.ln = layer_norm(self.dtype)
    self.drop_output = layers.Dropout(self.dropout)

  def __call__(self, x, kv, bias=None, deterministic=True):
    y = super().__call__(x, kv, bias, deterministic)
    return self.ln(x + self.drop_output(y, deterministic=deterministic))


class LMHead(nn.Module):
  """BERT's prediction head; its output matrix is the word embedding."""

  config: model_config.MedConfig

  @nn.compact
  def __call__(
    self,
    hidden: Float[Array, "B L D"],
    matrix: Float[Array, "W D"],
  ) -> predictions.Predictions:
    c = self.config
    x = layers.normal_dense(c.width, c, "transform")(hidden)
    x = layer_norm(c.dtype, name="ln")(layers.gelu(x))
    bias = self.param("bias", initial.zeros, (c.vocab_size,))
    return predictions.Predictions(x, matrix, bias)


def _attention(c: model_config.MedConfig) -> PostNormAttention:
  return PostNormAttention(c.width, c.num_heads, c.dropout, c.init_std, c.dtype)


def layer_norm(dtype: str, name: str | None = None) -> nn.Module:
  return layers.layer_norm(1e-12, dtype, name)


def with_first_token(
  token: int, input_ids: Int[Array, "B L"]
) -> Int[Array, "B L"]:
  """Replaces position 0 by the token that selects the mode: [CLS], [ENC] or
  [DEC]."""
  return input_ids.at[:, 0].set(token)


def _encoder_bias(mask):
  if mask is None:
    return None
  return (1.0 - mask[:, None, None, :]) * -1e9
