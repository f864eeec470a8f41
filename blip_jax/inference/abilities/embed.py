"""Vectors and hidden states of images and texts."""

from collections.abc import Sequence
from typing import Literal, overload

import numpy as np
from jaxtyping import Float

from blip_jax.inference import matching
from blip_jax.inference.abilities import base


class EmbedMethods(base.Loaded):
  """How `Model` embeds images and texts."""

  @overload
  def embed_images(
    self,
    images: base.Images,
    *,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    num_frames: int = 0,
    on_error: Literal["raise"] = "raise",
    progress: bool = False,
  ) -> Float[np.ndarray, "I C"]: ...

  @overload
  def embed_images(
    self,
    images: base.Images,
    *,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    num_frames: int = 0,
    on_error: Literal["skip"],
    progress: bool = False,
  ) -> tuple[Float[np.ndarray, "k C"], base.Kept]: ...

  def embed_images(
    self,
    images: base.Images,
    *,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    num_frames: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    progress: bool = False,
  ) -> Float[np.ndarray, "I C"] | tuple[Float[np.ndarray, "k C"], base.Kept]:
    """Embeds images, or videos, in the space that they share with texts.

    Args:
      images: as for `caption`.
      batch_size: images per batch.
      urls: whether an image may be an http(s) URL, which is then downloaded.
      allow_private: whether a URL may lead to addresses that are not public,
        such as those of this machine and its network.
      num_frames: frames taken of each video, as for `caption`; 0: `images` are
        images.
      on_error: what to do about an image that cannot be read: "raise", or
        "skip", which warns and leaves its vector out.
      progress: whether to show a progress bar.

    Returns:
      Unit vectors, so that dot products with those of `embed_texts` are
      cosines. With `on_error="skip"`, a pair: the vectors of the k images that
      could be read, and the numbers of these images, from 0 on.

    Raises:
      ValueError: the model has no such space, there are no images, or one
        cannot be read.
    """
    self._require("vision_proj", "embed images in a space shared with texts")
    batches = self._read(
      images, batch_size, urls, allow_private, num_frames, on_error, progress
    )
    vectors, kept = self.matcher.embed_images(batches)
    return vectors if on_error == "raise" else (vectors, kept)

  def embed_texts(
    self, texts: str | Sequence[str], *, batch_size: int = 64
  ) -> Float[np.ndarray, "M C"]:
    """Embeds texts in the space that they share with images.

    Args:
      texts: as for `match`.
      batch_size: texts per batch.

    Returns:
      Unit vectors, so that dot products with those of `embed_images` are
      cosines.

    Raises:
      ValueError: the model has no such space, there are no texts, or one has
        no words.
    """
    self._require("text_proj", "embed texts in a space shared with images")
    return self.matcher.embed_texts(texts, batch_size)

  def features(
    self,
    images: base.Images | None = None,
    texts: str | Sequence[str] | None = None,
    *,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
  ) -> matching.HiddenStates:
    """Returns hidden states: the original's feature extractor.

    Of images if only those are given, of texts if only those are given; with
    both, of text i fused with image i by cross-attention. The first token
    stands for the whole input.

    The three kinds live in different spaces: a cosine between them means
    nothing. `embed_images` and `embed_texts` share one space.

    Args:
      images: as for `caption`.
      texts: as for `match`.
      batch_size: images, texts or pairs per batch.
      urls: whether an image may be an http(s) URL, which is then downloaded.
      allow_private: whether a URL may lead to addresses that are not public,
        such as those of this machine and its network.

    Raises:
      ValueError: neither is given, the model lacks the encoder, there are not
        as many images as texts, or an input cannot be read.
    """
    if images is None and texts is None:
      raise ValueError("features: give images=, texts= or both")
    if texts is not None:
      self._require("text_encoder", "encode texts")
    tokens = None if texts is None else self.matcher.tokens(texts)
    if images is None:
      return self.matcher.features(None, tokens, self._batch_size(batch_size))
    if tokens is not None:
      images = matching.paired(images, tokens)
    batches = self._read(images, batch_size, urls, allow_private)
    return self.matcher.features(batches, tokens, self._batch_size(batch_size))
