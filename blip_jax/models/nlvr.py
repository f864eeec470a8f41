"""NLVR2: is a statement about two images true? (paper, section 5.4)

A text encoder in which every layer attends to both images.  Each image has its
own cross-attention weights, both of which start as copies of the pre-trained
ones.

Dimensions: B statements, J = 2B images (the first image of every statement,
then the second of every statement), N image tokens, L text length, D width, E
image width.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from blip_jax.models import config as model_config
from blip_jax.models import layers, med, vit

# Layers below this one average the outputs of the two images' attention; from
# here on a learned linear layer merges them.  The original uses the same index
# for text towers of any depth.
FIRST_MERGING_LAYER = 6


class TwoImageAttention(nn.Module):
  """Cross-attention to two images, with residual connection and LayerNorm.

  Attributes:
    config: of the text tower.
    learned: whether a linear layer merges the outputs for the two images;
      otherwise they are averaged.
  """

  config: model_config.MedConfig
  learned: bool

  def setup(self):
    c = self.config
    attention = lambda: layers.Attention(
      c.width, c.num_heads, c.dropout, c.init_std, c.dtype
    )
    self.image_0 = attention()
    self.image_1 = attention()
    if self.learned:
      self.merge = layers.normal_dense(c.width, c)
    self.ln = med.layer_norm(c.dtype)
    self.drop = layers.Dropout(c.dropout)

  def key_value(
    self, states: Float[Array, "J N E"]
  ) -> tuple[layers.KV, layers.KV]:
    """Keys and values of the first and of the second images."""
    first, second = jnp.split(states, 2)
    return self.image_0.key_value(first), self.image_1.key_value(second)

  def __call__(
    self,
    x: Float[Array, "B L D"],
    kv: tuple[layers.KV, layers.KV],
    bias: Float[Array, "#I 1 #L N"] | None = None,
    deterministic: bool = True,
  ) -> Float[Array, "B L D"]:
    first = self.image_0(x, kv[0], bias, deterministic)
    second = self.image_1(x, kv[1], bias, deterministic)
    if self.learned:
      y = self.merge(jnp.concatenate([first, second], axis=-1))
    else:
      y = (first + second) / 2
    return self.ln(x + self.drop(y, deterministic=deterministic))


def two_image_stacks(config: model_config.MedConfig) -> tuple[med.Stack, ...]:
  """Layers that attend to two images."""
  averaging = min(FIRST_MERGING_LAYER, config.depth)
  merging = config.depth - averaging
  attention = lambda learned: functools.partial(
    TwoImageAttention, learned=learned
  )
  return (
    med.Stack("layers", averaging, attention(False)),
    *(
      [med.Stack("merging_layers", merging, attention(True))] if merging else []
    ),
  )


class ClsHead(nn.Module):
  """Two linear layers that classify as false (0) or true (1)."""

  width: int

  @nn.compact
  def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B 2"]:
    x = layers.torch_dense(self.width, self.width, "fc_in")(x)
    return layers.torch_dense(2, self.width, "fc_out")(nn.relu(x))


class Nlvr(nn.Module):
  """Image tower, text encoder with attention to two images, and classifier."""

  config: model_config.BlipConfig

  def setup(self):
    c = self.config
    self.visual_encoder = vit.ViT(c.vit)
    self.text_encoder = med.Med(c.med, c.vit.width, stacks=two_image_stacks)
    self.cls_head = ClsHead(c.med.width)

  def __call__(
    self,
    image: Float[Array, "J H W 3"],
    input_ids: Int[Array, "B L"],
    attention_mask: Int[Array, "B L"],
    deterministic: bool = True,
  ) -> Float[Array, "B 2"]:
    """Logits of (false, true) for each statement about its two images.

    Args:
      image: normalised pixels of 2B images: the first image of every
        statement, then the second of every statement.
      input_ids: statements; position 0 is replaced by [ENC].
      attention_mask: 1 on tokens, 0 on padding.
      deterministic: disables dropout.
    """
    image_embeds = self.visual_encoder(image, deterministic)
    image_kv = self.text_encoder.encoder_kv(image_embeds)
    input_ids = med.with_first_token(self.config.med.tokens.enc, input_ids)
    hidden = self.text_encoder(
      input_ids, attention_mask, image_kv, deterministic=deterministic
    )
    return self.cls_head(hidden[:, 0])
