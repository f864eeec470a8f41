"""BLIP: an image tower, a text encoder, a text decoder and their heads.

Every task uses some of these methods, and only the parameters of those
(`families.py` lists the models of the paper).  The token at position 0 of a
text selects the mode ([CLS], [ENC] or [DEC]); it is set here and nowhere else.

Dimensions: B texts, I images or videos (B is a multiple of I, see `med.py`), F
frames, N image tokens, L text length, D width, C joint embedding, V vocabulary,
P positions of the cache.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from blip_jax.models import cache as cache_lib
from blip_jax.models import config as model_config
from blip_jax.models import layers, med, predictions, vit


class Blip(nn.Module):
  """All parts of BLIP; a model of `families.py` has parameters for some.

  Attributes:
    config: its sizes.
    answers: whether the decoder attends to questions, not to images.
  """

  config: model_config.BlipConfig
  answers: bool = False

  def setup(self):
    c = self.config
    self.visual_encoder = vit.ViT(c.vit)
    self.text_encoder = med.Med(c.med, c.vit.width)
    width = c.med.width if self.answers else c.vit.width
    self.text_decoder = med.Med(c.med, width, with_lm_head=True)
    self.vision_proj = layers.torch_dense(c.embed_dim, c.vit.width)
    self.text_proj = layers.torch_dense(c.embed_dim, c.med.width)
    self.itm_head = layers.torch_dense(2, c.med.width)

  def encode_image(
    self, image: Float[Array, "I *F H W 3"], deterministic: bool = True
  ) -> Float[Array, "I N D"]:
    """Encodes normalised pixels into image tokens, [CLS] first.

    The frames of a video, [I, F, H, W, 3], are encoded one by one, and their
    tokens concatenated (paper, section 5.6).
    """
    frames = image.reshape(-1, *image.shape[-3:])
    tokens = self.visual_encoder(frames, deterministic)
    return tokens.reshape(image.shape[0], -1, tokens.shape[-1])

  def encode_text(
    self,
    input_ids: Int[Array, "B L"],
    attention_mask: Int[Array, "B L"],
    deterministic: bool = True,
  ) -> Float[Array, "B L D"]:
    """Hidden states of texts that are encoded without an image."""
    input_ids = med.with_first_token(self.config.med.tokens.cls, input_ids)
    return self.text_encoder(
      input_ids, attention_mask, deterministic=deterministic
    )

  def image_features(
    self, image: Float[Array, "I H W 3"], deterministic: bool = True
  ) -> tuple[Float[Array, "I N D"], Float[Array, "I C"]]:
    """Image tokens, and unit vectors in the joint space."""
    image_embeds = self.encode_image(image, deterministic)
    return image_embeds, _unit(self.vision_proj(image_embeds[:, 0]))

  def video_features(
    self, frames: Float[Array, "I F H W 3"], deterministic: bool = True
  ) -> tuple[Float[Array, "I FN D"], Float[Array, "I C"]]:
    """Image tokens of all frames, and unit vectors in the joint space: the
    normalised mean of the frames' projections (paper, section 5.6)."""
    embeds = self.encode_image(frames, deterministic)
    of_frames = embeds.reshape(*frames.shape[:2], -1, embeds.shape[-1])
    return embeds, _unit(self.vision_proj(of_frames[:, :, 0]).mean(axis=1))

  def text_feat(
    self,
    input_ids: Int[Array, "B L"],
    attention_mask: Int[Array, "B L"],
    deterministic: bool = True,
  ) -> Float[Array, "B C"]:
    """Unit vectors of texts in the joint space."""
    embeds = self.encode_text(input_ids, attention_mask, deterministic)
    return _unit(self.text_proj(embeds[:, 0]))

  def image_kv(self, image_embeds: Float[Array, "I N D"]) -> med.EncoderKV:
    """Keys and values of images for `fuse` and `match`."""
    return self.text_encoder.encoder_kv(image_embeds)

  def decoder_kv(self, states: Float[Array, "I N D"]) -> med.EncoderKV:
    """Keys and values of images, or of questions, for `decode` and `extend`.

    If the text towers are tied, `image_kv` returns the same arrays, so that
    one of the two calls is enough.
    """
    return self.text_decoder.encoder_kv(states)

  def fuse(
    self,
    input_ids: Int[Array, "B L"],
    attention_mask: Int[Array, "B L"],
    image_kv: med.EncoderKV,
    deterministic: bool = True,
    legacy_cls: bool = False,
    image_mask: Int[Array, "I N"] | None = None,
  ) -> Float[Array, "B L D"]:
    """Hidden states of texts that attend to their images.

    Args:
      input_ids: texts; position 0 is replaced.
      attention_mask: 1 on tokens, 0 on padding.
      image_kv: keys and values of the images, from `image_kv`.
      deterministic: disables dropout.
      legacy_cls: starts texts with [CLS] instead of [ENC], which training uses.
        The original's demo and Hugging Face do so; only for comparison with
        them.
      image_mask: 1 on the states to attend to; all of them by default.
    """
    tokens = self.config.med.tokens
    first = tokens.cls if legacy_cls else tokens.enc
    input_ids = med.with_first_token(first, input_ids)
    return self.text_encoder(
      input_ids,
      attention_mask,
      image_kv,
      image_mask,
      deterministic=deterministic,
    )

  def match(
    self,
    input_ids: Int[Array, "B L"],
    attention_mask: Int[Array, "B L"],
    image_kv: med.EncoderKV,
    deterministic: bool = True,
    legacy_cls: bool = False,
    image_mask: Int[Array, "I N"] | None = None,
  ) -> Float[Array, "B 2"]:
    """ITM logits (not matched, matched); arguments as for `fuse`."""
    fused = self.fuse(
      *(input_ids, attention_mask, image_kv),
      *(deterministic, legacy_cls, image_mask),
    )
    return self.itm_head(fused[:, 0])

  def decode(
    self,
    input_ids: Int[Array, "B L"],
    attention_mask: Int[Array, "B L"],
    encoder_kv: med.EncoderKV,
    deterministic: bool = True,
    encoder_mask: Int[Array, "I N"] | None = None,
  ) -> predictions.Predictions:
    """Predicts the next token at every position, given images or questions.

    Args:
      input_ids: texts; position 0 is replaced by [DEC].
      attention_mask: 1 on tokens, 0 on padding.
      encoder_kv: keys and values, from `decoder_kv`.
      deterministic: disables dropout.
      encoder_mask: 1 on the states to attend to; all of them by default.
    """
    input_ids = med.with_first_token(self.config.med.tokens.dec, input_ids)
    hidden = self.text_decoder(
      input_ids,
      attention_mask,
      encoder_kv,
      encoder_mask,
      causal=True,
      deterministic=deterministic,
    )
    return self.text_decoder.predict(hidden)

  def init_cache(
    self, num_images: Any, max_length: int, num_texts: int = 1
  ) -> cache_lib.Cache:
    """An empty cache of `max_length` positions; see `med.Med.init_cache`."""
    return self.text_decoder.init_cache(num_images, max_length, num_texts)

  def extend(
    self,
    input_ids: Int[Array, "B L"],
    cache: cache_lib.Cache,
    encoder_kv: med.EncoderKV,
    encoder_mask: Int[Array, "I N"] | None = None,
    matrix: Float[Array, "W D"] | None = None,
  ) -> tuple[Float[Array, "B V"], cache_lib.Cache]:
    """Decodes tokens after those in the cache; see `med.Med.extend`.

    Returns:
      Logits of the token after the last one, with `matrix` as in
      `med.Med.predict`, and the new cache.
    """
    hidden, cache = self.text_decoder.extend(
      input_ids, cache, encoder_kv, encoder_mask
    )
    last = self.text_decoder.predict(hidden[:, -1:], matrix)
    return last.logits()[:, 0], cache

  def output_matrix(self) -> Float[Array, "W D"]:
    """That of the LM head; see `med.Med.output_matrix`."""
    return self.text_decoder.output_matrix()


def _unit(x: Float[Array, "B C"]) -> Float[Array, "B C"]:
  """x / max(|x|, 1e-12), as PyTorch normalises."""
  norm = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
  return x / jnp.maximum(norm, 1e-12)
