"""Captions of images and videos."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from blip_jax.inference import captioning, saliency
from blip_jax.inference.abilities import base


class CaptionMethods(base.Loaded):
  """How `Model` captions."""

  def caption(
    self,
    images: base.Images,
    *,
    prompt: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    urls: bool = False,
    allow_private: bool = False,
    num_frames: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    explain: bool = False,
    layer: int | None = None,
    heads: Sequence[int] | None = None,
    progress: bool = False,
    **options: Any,
  ) -> list[captioning.Caption | None]:
    """Generates captions of images, or of videos.

    `caption_stream` yields them one after the other instead.

    Args:
      images: one image or any number of them, each a path, encoded bytes, a
        uint8 array [H, W, 3], or a PIL image; with `num_frames`, videos.
      prompt: the text that captions continue; the model's own by default.
      batch_size: images per batch; by default as many as suit the devices
        (`runtime.devices.images_per_batch`). The last batch is padded to the
        same size, so that nothing is compiled twice; a few images make a
        smaller batch.
      seed: of sampling. Samples depend on the seed and on the image, not on
        the other images of the batch.
      urls: whether an image may be an http(s) URL, which is then downloaded.
      allow_private: whether a URL may lead to addresses that are not public,
        such as those of this machine and its network.
      num_frames: frames taken of each video, at equal steps, if `images` are
        videos: paths (extra [video]), or all frames as uint8 [F, H, W, 3] or as
        a list of images. The text attends to the frames' tokens together
        (section 5.6; the paper takes 8, and 16 for questions). 0: they are
        images.
      on_error: what to do about an image that cannot be read: "raise", or
        "skip", which warns, naming these images, and gives None in their place.
      explain: whether captions come with an `explanation`: which patches of the
        image each word rests on. Of images only.
      layer: of the decoder, whose attention explains; by default the middle
        one.
      heads: of that layer, whose maps are averaged; all by default.
      progress: whether to show a progress bar.
      options: num_beams, max_length, min_length, max_new_tokens,
        repetition_penalty, no_repeat_ngram_size, length_norm,
        num_return_sequences, sample, temperature, top_k, top_p: see
        `blip_jax.models.decoding.Decoding`. Lengths are in tokens and include
        the prompt. By default, the model's own.

    Returns:
      One caption per image, in order. With `num_return_sequences`, it is the
      best one, and the rest are its `others`.

    Raises:
      ValueError: the model does not generate captions, an option is unknown or
        out of range, or an image cannot be read; says which.
    """
    return [
      *self.caption_stream(
        images,
        prompt=prompt,
        batch_size=batch_size,
        seed=seed,
        urls=urls,
        allow_private=allow_private,
        num_frames=num_frames,
        on_error=on_error,
        explain=explain,
        layer=layer,
        heads=heads,
        progress=progress,
        **options,
      )
    ]

  def caption_stream(
    self,
    images: base.Images,
    *,
    prompt: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    urls: bool = False,
    allow_private: bool = False,
    num_frames: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    explain: bool = False,
    layer: int | None = None,
    heads: Sequence[int] | None = None,
    progress: bool = False,
    **options: Any,
  ) -> Iterator[captioning.Caption | None]:
    """Generates captions of any number of images, in little memory.

    At most two batches of images are read ahead, so that `images` may be an
    iterator over millions. A caption is yielded once its batch is full.

    Args:
      images: as for `caption`, and so are the other arguments.

    Returns:
      An iterator of one caption per image, in order; None for an image that was
      skipped. If an image cannot be read and is not skipped, the captions of
      all earlier batches come before the error.

    Raises:
      ValueError: as `caption`; before the first image is read, unless it is
        about an image.
    """
    if explain and num_frames:
      raise ValueError("explain: of images; leave out num_frames=")
    generate = self.captioner(
      prompt, explain=explain, layer=layer, heads=heads, **options
    )
    batches = self._read(
      images, batch_size, urls, allow_private, num_frames, on_error, progress
    )
    return captioning.results(batches, generate, seed)

  def captioner(
    self,
    prompt: str | None = None,
    *,
    explain: bool = False,
    layer: int | None = None,
    heads: Sequence[int] | None = None,
    **options: Any,
  ) -> captioning.Captioner:
    """Returns a function that generates captions of batches of pixels.

    Use it to load images by other means than `caption` does. Each batch size
    is compiled once.

    Args:
      prompt: as for `caption`.
      explain: as for `caption`.
      layer: as for `caption`.
      heads: as for `caption`.
      options: as for `caption`.

    Returns:
      `generate(pixels, seed=0, image_seeds=None)`, where

        pixels: uint8 [I, H, W, 3], or [I, F, H, W, 3] of videos, in the model's
          image size (`model.image` resizes to it).
        seed: of sampling.
        image_seeds: an integer below 2**32 for each image, which is combined
          with `seed`, so that an image gets the same samples in any batch. By
          default, a checksum of its pixels.

      Its method `start` takes the same arguments and does not wait: it returns
      a function that does, and then returns the captions.

    Raises:
      ValueError: the model does not generate captions, or an option is unknown
        or out of range.
    """
    if self.card.family not in ("caption", "pretrain"):
      raise self._lacks(
        "has no decoder that generates captions",
        "Load a captioner, such as 'model_base_caption_capfilt_large' or "
        "'Salesforce/blip-image-captioning-base'",
      )
    if not explain and (layer, heads) != (None, None):
      raise ValueError("layer and heads are of explanations; set explain=True")
    chosen = saliency.where(self.card.config.med, layer, heads)
    return captioning.Captioner(
      self.card,
      self.module,
      self._decoding_params,
      self.tokenizer,
      self.mesh,
      prompt,
      functools.partial(self._explainer.captions, where=chosen)
      if explain
      else None,
      **options,
    )
