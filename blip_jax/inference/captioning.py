"""Captions of batches of pixels, with the probabilities of their tokens."""

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import spmd
from jaxtyping import Int, UInt8

from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.inference import images as images_lib
from blip_jax.inference import matching
from blip_jax.inference import texts as texts_lib
from blip_jax.inference.explanation import Explanation
from blip_jax.models import card as card_lib
from blip_jax.models import decoding, generation, med
from blip_jax.runtime import sharding
from blip_jax.tasks import caption as caption_lib

# (pixels, tokens of a caption of each image, length of the prompt) -> what the
# words of the captions rest on.
Explain = Callable[
  [UInt8[np.ndarray, "I H W 3"], Int[np.ndarray, "I L"], int],
  list[Explanation],
]


@dataclasses.dataclass(frozen=True, repr=False)
class Caption:
  """A generated caption of an image, with its probabilities.

  Attributes:
    text: the caption, without the prompt.
    log_prob: natural logarithm of the caption's probability, given image and
      prompt. It includes [SEP], unless the caption stopped at the length limit.
    token_log_probs: log-probability of each token; they sum to `log_prob`.
    tokens: the tokens as strings, such as "play" and "##ing".
    score: what captions of one image are ranked by, the higher the better: a
      length-normalised log-probability with beam search.
    others: further captions of the same image, best first; empty unless
      `num_return_sequences` is above 1.
    explanation: which patches of the image each word rests on, if asked for.
  """

  text: str
  log_prob: float
  token_log_probs: tuple[float, ...]
  tokens: tuple[str, ...]
  score: float
  others: tuple["Caption", ...] = ()
  # Arrays have no single answer to whether they are equal.
  explanation: Explanation | None = dataclasses.field(
    default=None, compare=False
  )

  def __repr__(self) -> str:
    others = f", {len(self.others)} others" if self.others else ""
    return f"Caption({self.text!r}, log_prob={self.log_prob:.3f}{others})"


class Captioner:
  """See `inference.model.Model.captioner`."""

  def __init__(
    self,
    card: card_lib.Card,
    module: nn.Module,
    params: med.Params,
    tokenizer: tokenizer_lib.Tokenizer | None,
    mesh: jax.sharding.Mesh,
    prompt: str | None = None,
    explain: Explain | None = None,
    *,
    num_positions: int = 0,
    prompt_positions: int = 0,
    **options: Any,
  ):
    tokenizer = texts_lib.vocabulary(tokenizer, "generate text")
    config = card.config
    self._module, self._params, self._mesh = module, params, mesh
    self._tokenizer, self._explain = tokenizer, explain
    self._prompt = card.prompt if prompt is None else prompt
    self._prompt_ids = tokenizer.prompt_ids(self._prompt)
    self._settings = decoding.make(
      card.generation,
      len(self._prompt_ids),
      config.med.max_positions,
      **options,
    )
    most = max(self._settings.max_length, num_positions, prompt_positions)
    self._num_positions = decoding.num_positions_for(
      most, config.med.max_positions
    )
    self._prompt_positions = prompt_positions
    if 0 < prompt_positions < len(self._prompt_ids):
      raise ValueError(
        f"prompt: expected at most {prompt_positions} tokens, [DEC] included, "
        f"found {len(self._prompt_ids)}; shorten it"
      )

  def __call__(
    self,
    pixels: UInt8[np.ndarray, "I *F H W 3"],
    seed: int | Sequence[int] = 0,
    image_seeds: Sequence[int] | None = None,
  ) -> list[Caption]:
    return self.start(pixels, seed, image_seeds)()

  def start(
    self,
    pixels: UInt8[np.ndarray, "I *F H W 3"],
    seed: int | Sequence[int] = 0,
    image_seeds: Sequence[int] | None = None,
  ) -> Callable[[], list[Caption]]:
    """Starts to generate, and returns a function that waits for the captions.

    Devices compute batches in the order in which they are started.
    """
    if image_seeds is None:
      image_seeds = [zlib.crc32(image) for image in pixels]
    batch = {
      "pixels": pixels,
      "image_seeds": np.array(image_seeds, np.uint32),
    }
    prompt, length = np.array(self._prompt_ids, np.int32), None
    if self._prompt_positions:
      length = np.int32(len(prompt))
      padding = self._prompt_positions - len(prompt)
      prompt = np.pad(
        prompt, (0, padding), constant_values=self._tokenizer.pad_id
      )
    with sharding.activate(self._mesh):
      generated = generate_captions(
        (self._module, self._num_positions),
        self._params,
        sharding.put_batch(batch, self._mesh),
        prompt,
        self._settings,
        _seeds(seed),
        length,
      )
    rows = sharding.rows_later(generated)
    return lambda: self._captions(rows(), pixels)

  def _captions(
    self, generated: Any, pixels: UInt8[np.ndarray, "I *F H W 3"]
  ) -> list[Caption]:
    matching.refuse_nan(generated.token_log_probs)
    # The positions of the words after the prompt.
    span = slice(len(self._prompt_ids), int(self._settings.max_length))
    captions = [
      _caption(self._tokenizer, generation.Generated(*row), self._prompt, span)
      for row in zip(*generated, strict=True)
    ]
    if self._explain is None:
      return captions
    # Those of each rank together: one text for each image.
    ranks = [
      self._explain(pixels, generated.ids[:, rank], span.start)
      for rank in range(generated.ids.shape[1])
    ]
    return [
      _explained(caption, explanations)
      for caption, explanations in zip(
        captions, zip(*ranks, strict=True), strict=True
      )
    ]


def results(
  batches: Generator[images_lib.Batch, None, None],
  generate: Captioner,
  seed: int,
) -> Iterator[Caption | None]:
  """Yields a caption of each image, None of one that was skipped."""
  with contextlib.closing(batches):
    for pixels, errors in batches:
      for error, one in zip(errors, generate(pixels, seed), strict=False):
        yield one if error is None else None


def _caption(
  tokenizer: tokenizer_lib.Tokenizer,
  generated: generation.Generated,
  prompt: str,
  span: slice,
) -> Caption:
  """The best caption of one image, with the others; `span` are the positions
  after the prompt."""
  texts = tokenizer.decode(generated.ids, prompt)
  best, *others = [
    _one_caption(
      tokenizer,
      text,
      ids[span].tolist(),
      log_probs[span].tolist(),
      float(score),
    )
    for text, ids, log_probs, score in zip(texts, *generated, strict=True)
  ]
  return dataclasses.replace(best, others=tuple(others))


def _explained(
  caption: Caption, explanations: Sequence[Explanation]
) -> Caption:
  """A caption and its others, each with its explanation."""
  best, *others = [
    dataclasses.replace(one, explanation=explanation)
    for one, explanation in zip(
      (caption, *caption.others), explanations, strict=True
    )
  ]
  return dataclasses.replace(best, others=tuple(others))


def _one_caption(
  tokenizer: tokenizer_lib.Tokenizer,
  text: str,
  ids: list[int],
  log_probs: list[float],
  score: float,
) -> Caption:
  sep = tokenizer.sep_id
  end = ids.index(sep) + 1 if sep in ids else len(ids)
  return Caption(
    text,
    log_prob=sum(log_probs[:end]),
    token_log_probs=tuple(log_probs[:end]),
    tokens=tuple(tokenizer.pieces(ids[:end])),
    score=score,
  )


@functools.partial(jax.jit, static_argnums=0)
def generate_captions(
  module_and_positions,
  params,
  batch,
  prompt,
  settings,
  seed,
  prompt_length=None,
):
  """Generates captions; an image's samples depend on its own seeds only."""
  module, num_positions = module_and_positions
  image_seeds = batch["image_seeds"]
  fold = jax.vmap(lambda one, two: jax.random.fold_in(jax.random.key(one), two))
  keys = fold(jnp.broadcast_to(seed, image_seeds.shape), image_seeds)
  generated = caption_lib.generate(
    module,
    params,
    batch["pixels"],
    prompt,
    settings,
    num_positions,
    keys,
    prompt_length,
  )
  return jax.tree.map(
    lambda x: spmd.with_logical_constraint(
      x, ("batch", *[None] * (x.ndim - 1))
    ),
    generated,
  )


def _seeds(given: Any) -> Int[np.ndarray, "..."]:
  seeds = np.asarray(given)
  # Of longer numbers NumPy makes objects, and of JSON's there may be floats.
  if seeds.dtype.kind not in "iu" or (seeds != seeds.astype(np.int32)).any():
    raise ValueError(f"seed: expected a whole number of 32 bits, found {given}")
  return seeds.astype(np.int32)
