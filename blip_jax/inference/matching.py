"""Image-text matching and embeddings with a trained model.

Dimensions: I images, M texts, L text length, D width, C joint embedding.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.linen import spmd
from jaxtyping import Array, Float, Int, UInt8

from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.data import transforms
from blip_jax.inference import images as images_lib
from blip_jax.inference import scoring
from blip_jax.inference import texts as texts_lib
from blip_jax.models import blip, med
from blip_jax.runtime import sharding
from blip_jax.tasks import align, base

# Limits of a text, as in training; tokens include [ENC] and [SEP].
MAX_WORDS = 30
MAX_TOKENS = 35


class Match(NamedTuple):
  """How well images and texts match.

  Each field has shape [I, M] for I images and M texts, or [I] for pairs.

  Attributes:
    itc_cosine: cosine of the unimodal embeddings (ITC), in [-1, 1], without
      the temperature of training. Cheap: use it to find candidates.
    itm_prob: probability that image and text match, from the ITM head, whose
      encoder attends to the image. Use it for a yes or no.
    rank_score: the ITM head's "match" logit plus the cosine, by which BLIP
      re-ranks candidates (section 5.1).
  """

  itc_cosine: Float[np.ndarray, "..."]
  itm_prob: Float[np.ndarray, "..."]
  rank_score: Float[np.ndarray, "..."]

  def __repr__(self) -> str:
    return f"Match({brief(**self._asdict())})"


class HiddenStates(NamedTuple):
  """The output of an encoder for every token, not normalised.

  Attributes:
    states: [n, L, D] for n images, texts or pairs.
    mask: [n, L], 1 on tokens and 0 on padding.
  """

  states: Float[np.ndarray, "n L D"]
  mask: Int[np.ndarray, "n L"]

  def __repr__(self) -> str:
    return f"HiddenStates({brief(**self._asdict())})"


class Matcher:
  """The compiled programs of one model, for `inference.model.Model`."""

  def __init__(
    self,
    module: blip.Blip,
    params: med.Params,
    tokenizer: tokenizer_lib.Tokenizer | None,
    mesh: jax.sharding.Mesh,
  ):
    self._module = module
    self._params = params
    self._tokenizer = tokenizer
    self._mesh = mesh
    # Of a text.
    self.max_tokens = min(MAX_TOKENS, module.config.med.max_positions)
    self._scorer = scoring.Scorer(align.predict_fns(module), mesh)

  def match(
    self,
    batches: Iterable[images_lib.Batch],
    tokens: scoring.Texts,
    pairwise: bool,
    legacy_cls: bool,
    batch_size: int,
  ) -> tuple[Match, Int[np.ndarray, " k"]]:
    """See `inference.model.Model.match`.

    Returns:
      Scores of the images that can be read, and their numbers.
    """
    num_texts = len(tokens.input_ids)
    all_texts = np.arange(num_texts)

    def candidates(image: int) -> Int[np.ndarray, " n"]:
      return all_texts[image : image + 1] if pairwise else all_texts

    matches = self.match_candidates(
      batches, tokens, candidates, legacy_cls, batch_size
    )
    found = {i: match for i, match in enumerate(matches) if match is not None}
    # Fields first: [3, k, M].
    scores = np.array([*found.values()], np.float32)
    scores = scores.reshape(-1, 3, 1 if pairwise else num_texts).swapaxes(0, 1)
    match = Match(*(scores[..., 0] if pairwise else scores))
    return match, np.array([*found], int)

  def match_candidates(
    self,
    batches: Iterable[images_lib.Batch],
    tokens: scoring.Texts,
    candidates: Callable[[int], Int[np.ndarray, " n"]],
    legacy_cls: bool = False,
    batch_size: int = 8,
  ) -> Iterator[Match | None]:
    """Yields a `Match` of [n] for each image, with its n candidate texts.

    Args:
      batches: from `images.batches`; of an image that cannot be read the match
        is None.
      tokens: of all texts.
      candidates: number of an image -> rows of `tokens` to score it with.
      legacy_cls: see `models.blip.Blip.fuse`.
      batch_size: texts per batch.
    """
    text_feat = self.text_feat(tokens, batch_size)
    start = 0
    for batch in _nonempty(batches):
      embeds, image_feat = self._start_encoding(batch.pixels)
      rows = [np.empty(0, int)] * len(batch.pixels)
      for place in np.flatnonzero(batch.readable):
        rows[place] = candidates(start + int(place))
      logits = self._scorer.itm_logits(
        self._params, embeds, tokens, rows, legacy_cls
      )
      matches = _matches(image_feat(), text_feat, rows, logits)
      for readable, match in zip(batch.readable, matches, strict=False):
        yield match if readable else None
      start += len(batch.errors)

  def start_score(
    self,
    pixels: UInt8[np.ndarray, "I H W 3"],
    texts: Sequence[Sequence[str]],
    batch_size: int,
  ) -> Callable[[], list[Match]]:
    """Starts to match each image of a batch with its own texts.

    Args:
      pixels: in the model's image size; a batch that the mesh can share out.
      texts: the texts of each image, any number.
      batch_size: texts per batch of the unimodal text encoder.

    Returns:
      A function that waits for the devices, and returns a `Match` of [n] for
      each image with n texts.
    """
    offsets = np.cumsum([0, *map(len, texts)])
    if not offsets[-1]:
      nothing = [Match(*np.empty((3, 0), np.float32))] * len(texts)
      return lambda: nothing
    # First, so that the devices have work while texts are tokenised.
    embeds, feat = self._start_encoding(pixels)
    tokens = self.tokens([text for per_image in texts for text in per_image])
    text_feat = self._start_text_feat(tokens, batch_size)
    rows = [np.arange(*ends) for ends in itertools.pairwise(offsets)]
    logits = self._scorer.start_itm_logits(self._params, embeds, tokens, rows)
    return lambda: [*_matches(feat(), text_feat(), rows, logits())]

  def embed_images(
    self, batches: Iterable[images_lib.Batch]
  ) -> tuple[Float[np.ndarray, "k C"], Int[np.ndarray, " k"]]:
    """See `inference.model.Model.embed_images`.

    Returns:
      Unit vectors of the images that can be read, and their numbers.
    """
    vectors, readable = [], []
    for batch in _nonempty(batches):
      feat = self.image_feat(batch.pixels)[: len(batch.errors)]
      vectors.append(feat[batch.readable])
      readable.append(batch.readable)
    return np.concatenate(vectors), np.flatnonzero(np.concatenate(readable))

  def embed_texts(
    self, texts: str | Sequence[str], batch_size: int
  ) -> Float[np.ndarray, "M C"]:
    """See `inference.model.Model.embed_texts`."""
    return self.text_feat(self.tokens(texts), batch_size)

  def features(
    self,
    batches: Iterable[images_lib.Batch] | None,
    tokens: scoring.Texts | None,
    batch_size: int,
  ) -> HiddenStates:
    """See `inference.model.Model.features`."""
    if tokens is None:
      assert batches is not None
      states = self._states(self._image_batches(batches))
      return HiddenStates(states, np.ones(states.shape[:2], np.int32))
    if batches is None:
      inputs = self._text_batches(tokens, batch_size)
    else:
      inputs = self._pair_batches(batches, tokens)
    return HiddenStates(self._states(inputs), tokens.attention_mask)

  def _states(
    self, batches: Iterable[tuple[base.Batch, int]]
  ) -> Float[np.ndarray, "n L D"]:
    states = []
    for batch, num_rows in batches:
      with sharding.activate(self._mesh):
        hidden = _hidden(self._module, self._params, batch)
      states.append(refuse_nan(sharding.local_rows(hidden)[:num_rows]))
    return np.concatenate(states)

  def image_feat(
    self, pixels: UInt8[np.ndarray, "I ..."]
  ) -> Float[np.ndarray, "I C"]:
    """Unit vectors of images or videos that have the model's size already."""
    return self._start_encoding(pixels)[1]()

  def _start_encoding(
    self, pixels: UInt8[np.ndarray, "I ..."]
  ) -> tuple[Float[Array, "I N D"], Callable[[], Float[np.ndarray, "I C"]]]:
    batch = sharding.put_batch({"image": pixels}, self._mesh)
    with sharding.activate(self._mesh):
      embeds, feat = self._scorer.image_features(self._params, batch["image"])
    feat = sharding.rows_later(feat)
    return embeds, lambda: refuse_nan(feat())

  def text_feat(
    self, tokens: scoring.Texts, batch_size: int
  ) -> Float[np.ndarray, "M C"]:
    """Unit vectors of texts."""
    return self._start_text_feat(tokens, batch_size)()

  def _start_text_feat(
    self, tokens: scoring.Texts, batch_size: int
  ) -> Callable[[], Float[np.ndarray, "M C"]]:
    vectors = []
    for batch, num_rows in self._text_batches(tokens, batch_size):
      with sharding.activate(self._mesh):
        feat = self._scorer.text_feat(self._params, *base.text(batch))
      vectors.append((sharding.rows_later(feat), num_rows))
    return lambda: np.concatenate(
      [refuse_nan(feat()[:num_rows]) for feat, num_rows in vectors]
    )

  def _image_batches(
    self, batches: Iterable[images_lib.Batch]
  ) -> Iterator[tuple[base.Batch, int]]:
    for pixels, errors in _nonempty(batches):
      yield sharding.put_batch({"image": pixels}, self._mesh), len(errors)

  def _text_batches(
    self, tokens: scoring.Texts, batch_size: int
  ) -> Iterator[tuple[base.Batch, int]]:
    batch_size = sharding.padded_batch_size(batch_size, self._mesh)
    for start in range(0, len(tokens.input_ids), batch_size):
      num_texts = min(batch_size, len(tokens.input_ids) - start)
      yield self._text_batch(tokens, start, batch_size), num_texts

  def _pair_batches(
    self, batches: Iterable[images_lib.Batch], tokens: scoring.Texts
  ) -> Iterator[tuple[base.Batch, int]]:
    start = 0
    for batch, num_pairs in self._image_batches(batches):
      size = len(batch["image"]) // sharding.num_processes(self._mesh)
      texts = self._text_batch(tokens, start, size)
      yield {**batch, **texts}, num_pairs
      start += num_pairs

  def _text_batch(
    self, tokens: scoring.Texts, start: int, size: int
  ) -> base.Batch:
    """`size` texts from `start` on, padded by repeating the last text."""
    num_texts, length = tokens.input_ids.shape
    rows = np.minimum(np.arange(start, start + size), num_texts - 1)
    return sharding.put_batch(tokens.rows(rows, length), self._mesh)

  def tokens(
    self, texts: str | Sequence[str], clean: bool = True
  ) -> scoring.Texts:
    """Tokenises texts.

    Args:
      texts: one text, or any number of them.
      clean: whether to clean texts as in training; otherwise they are
        tokenised as they are.

    Raises:
      ValueError: the model has no vocabulary, there are no texts, or one has
        no words.
    """
    tokenizer = texts_lib.vocabulary(self._tokenizer, "read text")
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
      raise ValueError("texts: expected at least one, found none")
    cleaned = []
    for number, text in enumerate(texts):
      try:
        # Refuses unusable texts, also those that are taken as they are.
        printable = transforms.clean_text(text)
      except transforms.BadSample as error:
        raise ValueError(f"text {number}: {error}") from error
      cleaned.append(
        transforms.pre_caption(printable, MAX_WORDS) if clean else text
      )
    return scoring.trimmed(
      scoring.Texts(*tokenizer.encode(cleaned, self.max_tokens))
    )


def _matches(
  image_feat: Float[np.ndarray, "I C"],
  text_feat: Float[np.ndarray, "M C"],
  rows: Sequence[Int[np.ndarray, "_"]],
  logits: Sequence[Float[np.ndarray, "_ 2"]],
) -> Iterator[Match]:
  """Matches images, each with its own `rows` of the texts."""
  for vector, image_rows, image_logits in zip(
    image_feat, rows, logits, strict=True
  ):
    cosine = text_feat[image_rows] @ vector
    no, yes = refuse_nan(image_logits).T
    yield Match(cosine, np.exp(-np.logaddexp(0, no - yes)), yes + cosine)


def refuse_nan(values: np.ndarray) -> np.ndarray:
  """Returns the outputs of a model, which must not be NaN.

  Comparisons with NaN are false: a threshold would silently keep or drop it.

  Raises:
    ValueError: a value is NaN.
  """
  if np.isnan(values).any():
    raise ValueError(
      "the model gives NaN; its weights are damaged, or come from a training "
      "run that diverged"
    )
  return values


def paired(
  images: Any, tokens: scoring.Texts, num_frames: int = 0
) -> list[Any]:
  """The images, or videos, as a list, one for each text."""
  images = list(images_lib.as_iterable(images, num_frames))
  num_texts = len(tokens.input_ids)
  if len(images) != num_texts:
    raise ValueError(
      f"pairs: expected as many images as texts, found {len(images)} and "
      f"{num_texts}"
    )
  return images


def _nonempty(
  batches: Iterable[images_lib.Batch],
) -> Iterator[images_lib.Batch]:
  batch = None
  for batch in batches:
    yield batch
  if batch is None:
    raise ValueError("images: expected at least one, found none")


def brief(**fields: np.ndarray) -> str:
  """Names, types, shapes and ranges of arrays, in a line."""
  return ", ".join(
    f"{name}={x.dtype}{list(x.shape)}"
    + (f" from {x.min():.3g} to {x.max():.3g}" if x.size else "")
    for name, x in fields.items()
  )


@functools.partial(jax.jit, static_argnums=0)
def _hidden(module: nn.Module, params: med.Params, batch: base.Batch):
  """Hidden states of a batch's images, of its texts, or of both fused."""
  apply = functools.partial(module.apply, {"params": params})
  if "image" not in batch:
    states = apply(*base.text(batch), method="encode_text")
  else:
    states = apply(base.pixels(batch), method="encode_image")
    if "input_ids" in batch:
      image_kv = apply(states, method="image_kv")
      states = apply(*base.text(batch), image_kv, method="fuse")
  return spmd.with_logical_constraint(states, ("batch", None, None))
