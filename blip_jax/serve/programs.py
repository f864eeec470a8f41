"""What the service computes: compiled programs for batches of a few sizes.

All options of requests are inputs of a program or chosen among few, so that
nothing is compiled for a request once `warm_up` has run.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int32, UInt8

from blip_jax.data import transforms
from blip_jax.inference import answering, captioning, scoring
from blip_jax.inference.model import Model
from blip_jax.models import decoding

log = logging.getLogger(__name__)

Pixels = UInt8[np.ndarray, "H W 3"]


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one request may ask for.

  Attributes:
    batch_size: rows of a batch.
    max_n: samples of an image.
    max_tokens: generated tokens of a text.
    max_prompt: tokens of a prompt.
    max_inputs: images and texts to embed.
    max_pixels: of an image.
    urls: whether images may be URLs, which are then downloaded.
  """

  batch_size: int
  max_n: int = 4
  max_tokens: int = 24
  max_prompt: int = 15
  max_inputs: int = 64
  max_pixels: int = 50_000_000
  urls: bool = False


class Host:
  """A model with its programs.

  Args:
    name: by which requests ask for it.
    model: its `card.source` is shown to clients.
    limits: of a request.
  """

  def __init__(self, name: str, model: Model, limits: Limits):
    self.name, self.model, self.limits = name, model, limits
    # How the model generates if a request does not say.
    self.decoding = decoding.Decoding(**model.card.generation)
    # [DEC], a prompt, and what follows it.
    positions = model.card.config.med.max_positions
    self.max_prompt = min(limits.max_prompt, positions // 2)
    self.max_tokens = min(limits.max_tokens, positions - self.max_prompt - 1)

  @functools.cached_property
  def captions(self) -> bool:
    return self.model.lacks("caption") is None

  @functools.cached_property
  def answers(self) -> bool:
    return self.model.lacks("answer") is None

  @functools.cached_property
  def embeds(self) -> bool:
    return self.model.lacks("embed") is None

  def pixels(self, image: bytes) -> Pixels:
    """Decodes an image; raises `BadSample`."""
    (pixels,) = transforms.resized(
      image, [self.model.image], self.limits.max_pixels
    )
    return pixels


@dataclasses.dataclass(frozen=True)
class Captions:
  """Captions of images that continue one prompt, with the same options.

  Rows are pixels and a seed.

  Attributes:
    host: the model.
    prompt: None: the model's own.
    max_tokens: to generate; None: as the model does by itself.
    n: samples of each image; 0: all beams of beam search.
    temperature, top_p: of samples; None: as `Model.caption` has them.
  """

  host: Host
  prompt: str | None = None
  max_tokens: int | None = None
  n: int = 0
  temperature: float | None = None
  top_p: float | None = None

  name = "caption"

  @property
  def most(self) -> int:
    # Samples take the memory of a decoder each.
    return max(self.host.limits.batch_size // max(self.n, 1), 1)

  def captioner(self) -> captioning.Captioner:
    """Raises `ValueError` if the options do not fit the model."""
    host, options = self.host, dict[str, Any]()
    if self.n:
      options |= dict(sample=True, num_return_sequences=self.n)
      chosen = dict(temperature=self.temperature, top_p=self.top_p)
      options |= {k: v for k, v in chosen.items() if v is not None}
    else:
      options |= dict(num_return_sequences=host.decoding.num_beams)
    if self.max_tokens is not None:
      options["max_new_tokens"] = min(self.max_tokens, host.max_tokens)
    longest = host.max_prompt + 1 + host.max_tokens
    return host.model.captioner(
      self.prompt,
      prompt_positions=host.max_prompt + 1,
      num_positions=max(longest, host.decoding.max_length),
      **options,
    )

  def __call__(
    self, rows: Sequence[tuple[Pixels, int]]
  ) -> list[captioning.Caption]:
    # Several samples of an image are rare: one size is enough.
    all_sizes = sizes(self.most) if self.n < 2 else (self.most,)
    pixels, seeds = zip(*padded(rows, all_sizes), strict=True)
    return self.captioner()(np.stack(pixels), seeds)[: len(rows)]


@dataclasses.dataclass(frozen=True)
class Answers:
  """Answers to questions, by beam search.

  Rows are pixels, and ids and mask of a question, from `tokens`.

  Attributes:
    host: the model.
    max_tokens: of an answer; the model's own limit holds, too.
  """

  host: Host
  max_tokens: int | None = None

  name = "answer"

  @property
  def most(self) -> int:
    return self.host.limits.batch_size

  @functools.cached_property
  def answerer(self) -> answering.Answerer:
    longest = self.host.decoding.max_length
    options: dict[str, Any] = {"num_positions": longest}
    if self.max_tokens is not None:
      options["max_new_tokens"] = min(self.max_tokens, longest - 1)
    return self.host.model.answerer(None, **options)

  def tokens(
    self, question: str
  ) -> tuple[Int32[np.ndarray, " L"], Int32[np.ndarray, " L"]]:
    """Ids and mask, as long as those of any question.

    Raises:
      ValueError: it has no words, or is not UTF-8.
    """
    ids, mask, _ = self.answerer.tokens([question])
    return _lengthened(ids[0], mask[0], self.answerer.max_tokens)

  def __call__(self, rows: Sequence[Any]) -> list[answering.Answer]:
    inputs = map(np.stack, zip(*padded(rows, sizes(self.most)), strict=True))
    return self.answerer(*inputs)[: len(rows)]


@dataclasses.dataclass(frozen=True)
class ImageVectors:
  """Unit vectors of images; rows are pixels."""

  host: Host

  name = "embed_image"

  @property
  def most(self) -> int:
    return self.host.limits.batch_size

  def __call__(self, rows: Sequence[Pixels]) -> list[Float[np.ndarray, " C"]]:
    pixels = np.stack(padded(rows, sizes(self.most)))
    return [*self.host.model.matcher.image_feat(pixels)[: len(rows)]]


@dataclasses.dataclass(frozen=True)
class TextVectors:
  """Unit vectors of texts; rows are ids and mask, from `tokens`."""

  host: Host

  name = "embed_text"

  @property
  def most(self) -> int:
    return self.host.limits.batch_size

  def tokens(
    self, text: str
  ) -> tuple[Int32[np.ndarray, " L"], Int32[np.ndarray, " L"]]:
    """Ids and mask, as long as those of any text.

    Raises:
      ValueError: it has no words, or is not UTF-8.
    """
    matcher = self.host.model.matcher
    tokens = matcher.tokens(text)
    return _lengthened(
      tokens.input_ids[0], tokens.attention_mask[0], matcher.max_tokens
    )

  def __call__(self, rows: Sequence[Any]) -> list[Float[np.ndarray, " C"]]:
    all_rows = padded(rows, sizes(self.most))
    tokens = scoring.Texts(*map(np.stack, zip(*all_rows, strict=True)))
    matcher = self.host.model.matcher
    return [*matcher.text_feat(tokens, len(all_rows))[: len(rows)]]


def sizes(most: int) -> tuple[int, ...]:
  """The sizes of batches: powers of four, and the most rows."""
  found = [1]
  while found[-1] < most:
    found.append(min(4 * found[-1], most))
  return tuple(found)


def padded(rows: Sequence[Any], all_sizes: Sequence[int]) -> list[Any]:
  """Rows, and copies of the last one up to the next size."""
  size = next(size for size in all_sizes if size >= len(rows))
  return [*rows, *[rows[-1]] * (size - len(rows))]


def warm_up(host: Host) -> None:
  """Compiles all programs of a model, for all sizes of batches."""
  start, number = time.monotonic(), 0
  for program, row in _examples(host):
    for size in sizes(program.most):
      program([row] * size)
      number += 1
  log.info(
    "%s: %d programs are ready after %.0f s",
    *(host.name, number, time.monotonic() - start),
  )


def _examples(host: Host) -> Iterator[tuple[Any, Any]]:
  """Every kind of program, and a row for it."""
  size = host.model.card.config.vit.image_size
  black = np.zeros((*size, 3), np.uint8)
  if host.captions:
    for n in range(host.limits.max_n + 1):
      yield Captions(host, n=n), (black, 0)
  if host.answers:
    answers = Answers(host)
    yield answers, (black, *answers.tokens("what"))
  if host.embeds:
    texts = TextVectors(host)
    yield texts, texts.tokens("what")
    yield ImageVectors(host), black


def _lengthened(ids: Any, mask: Any, length: int) -> tuple[Any, Any]:
  """Adds padding, which a mask hides, so that all texts share a program."""
  added = (0, length - len(ids))
  return np.pad(ids, added), np.pad(mask, added)
