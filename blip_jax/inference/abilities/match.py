"""How well images and texts match, and why."""

from collections.abc import Sequence
from typing import Literal, overload

from blip_jax.data import transforms
from blip_jax.inference import explanation, matching, saliency
from blip_jax.inference import images as images_lib
from blip_jax.inference.abilities import base


class MatchMethods(base.Loaded):
  """How `Model` matches images with texts."""

  @overload
  def match(
    self,
    images: base.Images,
    texts: str | Sequence[str],
    *,
    pairwise: bool = False,
    legacy_cls: bool = False,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    num_frames: int = 0,
    on_error: Literal["raise"] = "raise",
    progress: bool = False,
  ) -> matching.Match: ...

  @overload
  def match(
    self,
    images: base.Images,
    texts: str | Sequence[str],
    *,
    pairwise: bool = False,
    legacy_cls: bool = False,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    num_frames: int = 0,
    on_error: Literal["skip"],
    progress: bool = False,
  ) -> tuple[matching.Match, base.Kept]: ...

  def match(
    self,
    images: base.Images,
    texts: str | Sequence[str],
    *,
    pairwise: bool = False,
    legacy_cls: bool = False,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    num_frames: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    progress: bool = False,
  ) -> matching.Match | tuple[matching.Match, base.Kept]:
    """Scores how well images and texts match, by ITC and ITM (section 3.2).

    Args:
      images: as for `caption`.
      texts: one text or any number of them. They are read as in training:
        lower case, most punctuation removed, at most 30 words and 35 tokens.
      pairwise: whether text i is compared with image i only; by default every
        text is compared with every image.
      legacy_cls: reproduces the numbers of the original demo and of Hugging
        Face: texts are not cleaned, and start with [CLS] where training had
        [ENC].
      batch_size: images per batch. Each image is encoded and projected once,
        however many texts are compared with it.
      urls: whether an image may be an http(s) URL, which is then downloaded.
      allow_private: whether a URL may lead to addresses that are not public,
        such as those of this machine and its network.
      num_frames: frames taken of each video, as for `caption`; 0: `images` are
        images.
      on_error: what to do about an image that cannot be read: "raise", or
        "skip", which warns and leaves its scores out.
      progress: whether to show a progress bar.

    Returns:
      Scores [I, M] for I images and M texts; [I] with `pairwise`. With
      `on_error="skip"`, a pair: the scores of the k images that could be read,
      [k, M] or [k], and the numbers of these images, from 0 on.

    Raises:
      ValueError: the model has no ITM head, there are no images or no texts, a
        text has no words, `pairwise` got unequal numbers, or an image cannot
        be read.
    """
    self._require("itm_head", "match images with texts")
    tokens = self.matcher.tokens(texts, clean=not legacy_cls)
    if pairwise:
      images = matching.paired(images, tokens, num_frames)
    batches = self._read(
      images, batch_size, urls, allow_private, num_frames, on_error, progress
    )
    match, kept = self.matcher.match(
      batches, tokens, pairwise, legacy_cls, self._batch_size(batch_size)
    )
    return match if on_error == "raise" else (match, kept)

  def explain(
    self,
    image: images_lib.Image,
    text: str,
    *,
    layer: int | None = None,
    heads: Sequence[int] | None = None,
    grad_cam: bool = False,
    urls: bool = False,
    allow_private: bool = False,
  ) -> explanation.Explanation:
    """Says on which patches of an image its match with each word rests.

    By integrated gradients of the ITM logit; see `inference.saliency`. What the
    words of a generated caption rest on is in `caption(..., explain=True)`.

    Args:
      image: one, as for `caption`.
      text: one, read as for `match`.
      layer: of the text encoder, from 0 on, whose attention to the image
        explains; by default the middle one, and the last one for the whole
        text. In the last one, words have no maps: they are zero.
      heads: whose maps are averaged; all by default.
      grad_cam: whether to take the gradient at all of the attention alone, as
        LAVIS does. It is faster, and misses what is named more often.
      urls: whether the image may be an http(s) URL, which is then downloaded.
      allow_private: whether a URL may lead to addresses that are not public,
        such as those of this machine and its network.

    Raises:
      ValueError: the model has no ITM head, there is no such layer or head, the
        text has no words, or the image cannot be read.
    """
    self._require("itm_head", "explain a match")
    chosen = saliency.where(self.card.config.med, layer, heads)
    tokens = self.matcher.tokens(text)
    if len(tokens.input_ids) != 1:
      raise ValueError(f"explain: expected one text, found {text!r:.200}")
    read = images_lib.ImageReader(self.image, urls, allow_private=allow_private)
    try:
      pixels = read(image)
    except transforms.BadSample as error:
      why = images_lib.where(read.what, 0, image, error)
      raise ValueError(why) from error
    gates = saliency.GRAD_CAM if grad_cam else saliency.INTEGRATED
    return self._explainer.match(pixels, tokens, chosen, gates)
