"""BLIP: an image tower, a text encoder, a text decoder and their heads.

Every task calls some of these methods; which, and with which parameters, is the
task's business (`families.py` lists the models of the paper).  Position 0 of a
text says what the text is for, so it is written here and nowhere else.

Dimensions: B texts, I images or videos (see `med.py`), F frames, N image
tokens, L text length, D width, C joint embedding, V vocabulary.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from blip_jax.models import config as model_config
from blip_jax.models import layers, med, vit


class Blip(nn.Module):
  config: model_config.BlipConfig

  def setup(self):
    c = self.config
    self.visual_encoder = vit.ViT(c.vit)
    self.text_encoder = med.Med(c.med)
    self.text_decoder = med.Med(c.med, with_lm_head=True)
    self.vision_proj = layers.torch_dense(c.embed_dim, c.vit.width)
    self.text_proj = layers.torch_dense(c.embed_dim, c.med.width)
    self.itm_head = layers.torch_dense(2, c.med.width)

  def encode_image(
    self, image: Float[Array, "I H W 3"], deterministic: bool = True
  ) -> Float[Array, "I N D"]:
    """All image tokens, [CLS] first, of normalised pixels."""
    return self.visual_encoder(image, deterministic)

  def encode_text(
    self,
    input_ids: Int[Array, "B L"],
    attention_mask: Int[Array, "B L"],
    deterministic: bool = True,
  ) -> Float[Array, "B L D"]:
    """Hidden states of texts that see no image."""
    input_ids = med.begin_with(self.config.med.tokens.cls, input_ids)
    return self.text_encoder(
      input_ids, attention_mask, deterministic=deterministic
    )

  def image_features(
    self, image: Float[Array, "I H W 3"], deterministic: bool = True
  ) -> tuple[Float[Array, "I N D"], Float[Array, "I C"]]:
    """Image tokens, and unit vectors in the space shared with texts."""
    image_embeds = self.encode_image(image, deterministic)
    return image_embeds, _unit(self.vision_proj(image_embeds[:, 0]))

  def video_features(
    self, frames: Float[Array, "I F H W 3"], deterministic: bool = True
  ) -> tuple[Float[Array, "I FN D"], Float[Array, "I C"]]:
    """The tokens of all frames, one frame after the other, and unit vectors:
    the mean of what the frames project to (paper, 5.6)."""
    videos, number = frames.shape[:2]
    embeds = self.encode_image(
      frames.reshape(-1, *frames.shape[2:]), deterministic
    )
    projected = self.vision_proj(embeds[:, 0])
    feat = _unit(projected.reshape(videos, number, -1).mean(axis=1))
    return embeds.reshape(videos, -1, embeds.shape[-1]), feat

  def text_feat(
    self,
    input_ids: Int[Array, "B L"],
    attention_mask: Int[Array, "B L"],
    deterministic: bool = True,
  ) -> Float[Array, "B C"]:
    """Unit vectors of texts in the space shared with images."""
    embeds = self.encode_text(input_ids, attention_mask, deterministic)
    return _unit(self.text_proj(embeds[:, 0]))

  def image_kv(self, image_embeds: Float[Array, "I N D"]) -> med.EncoderKV:
    """Keys and values for `match`."""
    return self.text_encoder.project_encoder_states(image_embeds)

  def decoder_kv(self, states: Float[Array, "I N D"]) -> med.EncoderKV:
    """Keys and values for `decode`, of images or of questions; the same arrays
    as `image_kv` where the text towers are tied, and then not worth
    computing twice."""
    return self.text_decoder.project_encoder_states(states)

  def fuse(
    self,
    input_ids: Int[Array, "B L"],
    attention_mask: Int[Array, "B L"],
    image_kv: med.EncoderKV,
    deterministic: bool = True,
    legacy_cls: bool = False,
  ) -> Float[Array, "B L D"]:
    """Hidden states of a text that looks at its image.

    `legacy_cls` leaves [CLS] where training had [ENC], as the original's demo
    and Hugging Face do; it is for comparing numbers with theirs.
    """
    tokens = self.config.med.tokens
    first = tokens.cls if legacy_cls else tokens.enc
    input_ids = med.begin_with(first, input_ids)
    return self.text_encoder(
      input_ids, attention_mask, image_kv, deterministic=deterministic
    )

  def match(
    self,
    input_ids: Int[Array, "B L"],
    attention_mask: Int[Array, "B L"],
    image_kv: med.EncoderKV,
    deterministic: bool = True,
    legacy_cls: bool = False,
  ) -> Float[Array, "B 2"]:
    """ITM logits; class 1 says that text and image belong together."""
    fused = self.fuse(
      input_ids, attention_mask, image_kv, deterministic, legacy_cls
    )
    return self.itm_head(fused[:, 0])

  def decode(
    self,
    input_ids: Int[Array, "B L"],
    attention_mask: Int[Array, "B L"],
    encoder_kv: med.EncoderKV,
    deterministic: bool = True,
    encoder_mask: Int[Array, "I N"] | None = None,
  ) -> Float[Array, "B L V"]:
    """Scores of the token after each one, given an image or a question."""
    input_ids = med.begin_with(self.config.med.tokens.dec, input_ids)
    hidden = self.text_decoder(
      input_ids,
      attention_mask,
      encoder_kv,
      encoder_mask,
      causal=True,
      deterministic=deterministic,
    )
    return self.text_decoder.logits(hidden)

  def init_cache(
    self, num_images: int, max_length: int, num_texts: int = 1
  ) -> med.Cache:
    return self.text_decoder.init_cache(num_images, max_length, num_texts)

  def extend(
    self,
    input_ids: Int[Array, "B L"],
    cache: med.Cache,
    encoder_kv: med.EncoderKV,
    encoder_mask: Int[Array, "I N"] | None = None,
  ) -> tuple[Float[Array, "B V"], med.Cache]:
    """Scores of the token after the given ones, which continue the cache."""
    hidden, cache = self.text_decoder.extend(
      input_ids, cache, encoder_kv, encoder_mask
    )
    return self.text_decoder.logits(hidden[:, -1:])[:, 0], cache


def _unit(x: Float[Array, "B C"]) -> Float[Array, "B C"]:
  """x / |x|, with PyTorch's guard against zero vectors."""
  norm = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
  return x / jnp.maximum(norm, 1e-12)
