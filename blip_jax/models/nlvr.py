"""NLVR2: is a statement about two images true? (paper, section 5.4)

One text encoder whose every layer looks at both images, each through weights of
its own, which start as copies of what pre-training learned for one image.

Dimensions: B statements, J = 2B images (all first ones, then all second ones),
N image tokens, L text length, D width.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from blip_jax.models import config as model_config
from blip_jax.models import layers, med, vit

# Layers below this one average what they see in the two images; from here on a
# linear layer learns to merge it.  The original counts so at any depth.
FIRST_MERGING_LAYER = 6


class TwinAttention(nn.Module):
  """Cross-attention to two images, residual and LayerNorm."""

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
    self.drop = nn.Dropout(c.dropout)

  def project(
    self, states: Float[Array, "J N E"]
  ) -> tuple[layers.KV, layers.KV]:
    first, second = jnp.split(states, 2)
    return self.image_0.project(first), self.image_1.project(second)

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


def look_at_two(config: model_config.MedConfig, index: int) -> nn.Module:
  """Cross-attention of layer `index` to two images."""
  return TwinAttention(config, learned=index >= FIRST_MERGING_LAYER)


class ClsHead(nn.Module):
  """Two linear layers that say false (class 0) or true (class 1)."""

  width: int

  @nn.compact
  def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B 2"]:
    x = layers.torch_dense(self.width, self.width, "fc_in")(x)
    return layers.torch_dense(2, self.width, "fc_out")(nn.relu(x))


class Nlvr(nn.Module):
  config: model_config.BlipConfig

  def setup(self):
    c = self.config
    self.visual_encoder = vit.ViT(c.vit)
    self.text_encoder = med.Med(c.med, cross_attention=look_at_two)
    self.cls_head = ClsHead(c.med.width)

  def __call__(
    self,
    image: Float[Array, "J H W 3"],
    input_ids: Int[Array, "B L"],
    attention_mask: Int[Array, "B L"],
    deterministic: bool = True,
  ) -> Float[Array, "B 2"]:
    """Scores of false and true for each statement about its two images.

    Args:
      image: normalised pixels of 2B images, all first ones before all second.
      input_ids: statements; position 0 becomes [ENC].
      attention_mask: 1 on tokens.
      deterministic: no dropout.
    """
    image_embeds = self.visual_encoder(image, deterministic)
    image_kv = self.text_encoder.project_encoder_states(image_embeds)
    input_ids = med.begin_with(self.config.med.tokens.enc, input_ids)
    hidden = self.text_encoder(
      input_ids, attention_mask, image_kv, deterministic=deterministic
    )
    return self.cls_head(hidden[:, 0])
