"""Matching and embedding pictures and texts with a model that is finished.

Dimensions: I pictures, M texts, L text length, D width, C joint embedding.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.data import transforms
from blip_jax.inference import images as images_lib
from blip_jax.inference import scoring
from blip_jax.models import med
from blip_jax.runtime import sharding
from blip_jax.tasks import align, base

# Of a text, as retrieval was trained; tokens include the special ones.
MAX_WORDS = 30
MAX_TOKENS = 35


class Match(NamedTuple):
  """How well pictures and texts go together: [I, M] for I pictures and M
  texts, or [I] for pairs.

  Attributes:
    itc_cosine: of their unit vectors, -1 to 1; cheap, and good for finding
      candidates. The temperature of training is not in it.
    itm_prob: that they belong together, says the head for matching, which
      looks at both; good for a yes or no.
    rank_score: the head's logit plus the cosine, by which BLIP ranks.
  """

  itc_cosine: Float[np.ndarray, "..."]
  itm_prob: Float[np.ndarray, "..."]
  rank_score: Float[np.ndarray, "..."]


class HiddenStates(NamedTuple):
  """What a tower gives for every token, not normalised.

  Attributes:
    states: [n, L, D].
    mask: 1 on tokens, 0 on padding.
  """

  states: Float[np.ndarray, "n L D"]
  mask: Int[np.ndarray, "n L"]


class Matcher:
  """The programs of one model; `inference.Model` says what they are for."""

  def __init__(
    self,
    module: nn.Module,
    params: med.Params,
    tokenizer: tokenizer_lib.Tokenizer | None,
    mesh: jax.sharding.Mesh,
  ):
    self._module = module
    self._params = params
    self._tokenizer = tokenizer
    self._mesh = mesh
    self._scorer = scoring.Scorer(align.predict_fns(module), mesh)

  def match(
    self,
    images: images_lib.Image | Iterable[images_lib.Image],
    texts: str | Sequence[str],
    read: images_lib.ImageReader,
    pairwise: bool,
    legacy_cls: bool,
    batch_size: int,
  ) -> Match:
    tokens = self.tokens(texts, as_they_are=legacy_cls)
    if pairwise:
      images = _as_many(images, tokens)
    everything = np.arange(len(tokens.input_ids))
    wanted = lambda row: everything[row : row + 1] if pairwise else everything
    found = self.scored(images, tokens, wanted, read, legacy_cls, batch_size)
    fields = (np.stack(field) for field in zip(*found, strict=True))
    return Match(*(field[:, 0] if pairwise else field for field in fields))

  def scored(
    self,
    images: images_lib.Image | Iterable[images_lib.Image],
    tokens: scoring.Texts,
    wanted: Callable[[int], Int[np.ndarray, " n"]],
    read: images_lib.ImageReader,
    legacy_cls: bool = False,
    batch_size: int = 8,
  ) -> Iterator[Match]:
    """Picture by picture, with those texts that are wanted of its number."""
    text_feat = self.text_feat(tokens, batch_size)
    for embeds, feat, rows in self._encoded(images, read, batch_size):
      # The last batch is filled up with black pictures, which nothing looks at.
      blank = [np.empty(0, int)] * (len(feat) - len(rows))
      texts = [*map(wanted, rows), *blank]
      looked = self._looked(embeds, feat, tokens, text_feat, texts, legacy_cls)
      yield from itertools.islice(looked, len(rows))

  def score(
    self,
    pixels: UInt8[np.ndarray, "I H W 3"],
    texts: Sequence[Sequence[str]],
    batch_size: int,
  ) -> list[Match]:
    """How pictures of the model's size match texts of their own.

    Args:
      pixels: of as many pictures as a device batch has.
      texts: of each picture, any number.
      batch_size: texts that are encoded alone at a time.
    """
    numbers = np.cumsum([0, *map(len, texts)])
    if not numbers[-1]:
      return [Match(*np.empty((3, 0), np.float32))] * len(texts)
    tokens = self.tokens([text for own in texts for text in own])
    text_feat = self.text_feat(tokens, batch_size)
    wanted = [np.arange(*ends) for ends in itertools.pairwise(numbers)]
    embeds, feat = self._encode(pixels)
    return [*self._looked(embeds, feat, tokens, text_feat, wanted)]

  def _looked(
    self, embeds, feat, tokens, text_feat, wanted, legacy_cls=False
  ) -> Iterator[Match]:
    """What encoded pictures say of those texts that are wanted of each."""
    logits = self._scorer.itm_logits(
      self._params, embeds, tokens, wanted, legacy_cls
    )
    for own, of, logit in zip(feat, wanted, logits, strict=True):
      cosine, (no, yes) = text_feat[of] @ own, refuse_nan(logit).T
      yield Match(cosine, np.exp(-np.logaddexp(0, no - yes)), yes + cosine)

  def embed_images(
    self,
    images: images_lib.Image | Iterable[images_lib.Image],
    read: images_lib.ImageReader,
    batch_size: int,
  ) -> Float[np.ndarray, "I C"]:
    encoded = self._encoded(images, read, batch_size)
    return np.concatenate([feat[: len(rows)] for _, feat, rows in encoded])

  def embed_texts(
    self, texts: str | Sequence[str], batch_size: int
  ) -> Float[np.ndarray, "M C"]:
    return self.text_feat(self.tokens(texts), batch_size)

  def features(
    self,
    images: images_lib.Image | Iterable[images_lib.Image] | None,
    texts: str | Sequence[str] | None,
    read: images_lib.ImageReader,
    batch_size: int,
  ) -> HiddenStates:
    tokens = None if texts is None else self.tokens(texts)
    if images is None:
      batches = self._text_batches(tokens, batch_size)
    elif tokens is None:
      batches = self._image_batches(images, read, batch_size)
    else:
      images = _as_many(images, tokens)
      batches = self._pair_batches(images, tokens, read, batch_size)
    states = []
    for batch, number in batches:
      with sharding.activate(self._mesh):
        found = _hidden(self._module, self._params, batch)
      states.append(refuse_nan(sharding.local_rows(found)[:number]))
    states = np.concatenate(states)
    if tokens is None:
      return HiddenStates(states, np.ones(states.shape[:2], np.int32))
    return HiddenStates(states, tokens.attention_mask)

  def image_feat(
    self, pixels: UInt8[np.ndarray, "I ..."]
  ) -> Float[np.ndarray, "I C"]:
    """Of pictures or videos that are in the model's size already."""
    return self._encode(pixels)[1]

  def _encode(
    self, pixels: UInt8[np.ndarray, "I ..."]
  ) -> tuple[Float[Array, "I N D"], Float[np.ndarray, "I C"]]:
    batch = sharding.put_batch({"image": pixels}, self._mesh)
    with sharding.activate(self._mesh):
      embeds, feat = self._scorer.image_features(self._params, batch["image"])
    return embeds, refuse_nan(sharding.local_rows(feat))

  def text_feat(
    self, tokens: scoring.Texts, batch_size: int
  ) -> Float[np.ndarray, "M C"]:
    found = []
    for batch, number in self._text_batches(tokens, batch_size):
      with sharding.activate(self._mesh):
        feat = self._scorer.text_feat(self._params, *base.text(batch))
      found.append(refuse_nan(sharding.local_rows(feat)[:number]))
    return np.concatenate(found)

  def _encoded(
    self, images, read: images_lib.ImageReader, batch_size: int
  ) -> Iterator[tuple[Float[Array, "I N D"], Float[np.ndarray, "I C"], range]]:
    """Tokens and unit vectors of a batch, and which pictures it has."""
    start = 0
    for pixels, number in self._pixels(images, read, batch_size):
      yield *self._encode(pixels), range(start, start + number)
      start += number

  def _image_batches(
    self, images, read: images_lib.ImageReader, batch_size: int
  ):
    for pixels, number in self._pixels(images, read, batch_size):
      yield sharding.put_batch({"image": pixels}, self._mesh), number

  def _pixels(self, images, read: images_lib.ImageReader, batch_size: int):
    number = 0
    for pixels, number in images_lib.batches(
      images, read, batch_size, self._mesh
    ):
      yield pixels, number
    if not number:
      raise ValueError("images: there are none")

  def _text_batches(self, tokens: scoring.Texts, batch_size: int):
    batch_size = sharding.padded_batch_size(batch_size, self._mesh)
    for start in range(0, len(tokens.input_ids), batch_size):
      number = min(batch_size, len(tokens.input_ids) - start)
      yield self._texts(tokens, start, batch_size), number

  def _pair_batches(self, images, tokens, read, batch_size: int):
    start = 0
    for batch, number in self._image_batches(images, read, batch_size):
      size = len(batch["image"]) // sharding.num_processes(self._mesh)
      yield batch | self._texts(tokens, start, size), number
      start += number

  def _texts(self, tokens: scoring.Texts, start: int, size: int):
    """So many texts; behind the last one it comes again."""
    number, length = tokens.input_ids.shape
    rows = np.minimum(np.arange(start, start + size), number - 1)
    return sharding.put_batch(tokens.rows(rows, length), self._mesh)

  def tokens(
    self, texts: str | Sequence[str], as_they_are: bool = False
  ) -> scoring.Texts:
    """Raises `ValueError` for no texts, and for one without words."""
    if self._tokenizer is None:
      raise ValueError(
        "this model has no vocabulary, so it cannot read; load it with "
        "tokenizer=, a folder with its vocab.txt"
      )
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
      raise ValueError("texts: there are none")
    cleaned = []
    for number, text in enumerate(texts):
      try:
        clean = transforms.clean_text(text)
      except transforms.BadSample as error:
        raise ValueError(f"text {number}: {error}") from error
      cleaned.append(
        text if as_they_are else transforms.pre_caption(clean, MAX_WORDS)
      )
    room = min(MAX_TOKENS, self._module.config.med.max_positions)
    return scoring.trimmed(
      scoring.Texts(*self._tokenizer.encode(cleaned, room))
    )


def refuse_nan(values: np.ndarray) -> np.ndarray:
  """What a model gave, or `ValueError`: a NaN loses every comparison, and so
  would pass for a score that is below, or not below, whatever asks."""
  if np.isnan(values).any():
    raise ValueError(
      "the model gives NaN; its weights are damaged, or are of a run that has "
      "diverged"
    )
  return values


def _as_many(images, tokens: scoring.Texts) -> list[images_lib.Image]:
  """The pictures, of which there must be one for each text."""
  images, number = list(images_lib.one_or_many(images)), len(tokens.input_ids)
  if len(images) != number:
    raise ValueError(
      f"pairs: expected as many pictures as texts, found {len(images)} and "
      f"{number}"
    )
  return images


@functools.partial(jax.jit, static_argnums=0)
def _hidden(module: nn.Module, params: med.Params, batch: base.Batch):
  """Hidden states of a batch's pictures, of its texts, or of both together."""
  apply = functools.partial(module.apply, {"params": params})
  if "image" not in batch:
    states = apply(*base.text(batch), method="encode_text")
  else:
    states = apply(base.pixels(batch), method="encode_image")
    if "input_ids" in batch:
      image_kv = apply(states, method="image_kv")
      states = apply(*base.text(batch), image_kv, method="fuse")
  return nn.with_logical_constraint(states, ("batch", None, None))
