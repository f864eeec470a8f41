"""Captions of batches of pixels, with the probabilities of their tokens."""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.linen import spmd
from jaxtyping import UInt8

from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.inference import matching
from blip_jax.models import card as card_lib
from blip_jax.models import decoding, generation, med
from blip_jax.runtime import sharding
from blip_jax.tasks import caption as caption_lib


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
  """

  text: str
  log_prob: float
  token_log_probs: tuple[float, ...]
  tokens: tuple[str, ...]
  score: float
  others: tuple["Caption", ...] = ()

  def __repr__(self) -> str:
    others = f", {len(self.others)} others" if self.others else ""
    return f"Caption({self.text!r}, log_prob={self.log_prob:.3f}{others})"


def captioner(
  card: card_lib.Card,
  module: nn.Module,
  params: med.Params,
  tokenizer: tokenizer_lib.Tokenizer | None,
  mesh: jax.sharding.Mesh,
  prompt: str | None = None,
  **options: Any,
) -> Callable[..., list[Caption]]:
  """See `inference.model.Model.captioner`."""
  if tokenizer is None:
    raise ValueError(
      "this model has no vocabulary, so it cannot generate text; load it "
      "with tokenizer=, a folder with its vocab.txt"
    )
  config = card.config
  text_prompt = card.prompt if prompt is None else prompt
  prompt_ids = tokenizer.prompt_ids(text_prompt)
  settings = decoding.make(
    card.generation, len(prompt_ids), config.med.max_positions, **options
  )
  num_positions = decoding.num_positions_for(
    settings.max_length, config.med.max_positions
  )

  def generate(
    pixels: UInt8[np.ndarray, "I H W 3"],
    seed: int = 0,
    image_seeds: Sequence[int] | None = None,
  ) -> list[Caption]:
    if image_seeds is None:
      image_seeds = [zlib.crc32(image) for image in pixels]
    batch = {
      "pixels": pixels,
      "image_seeds": np.array(image_seeds, np.uint32),
    }
    with sharding.activate(mesh):
      generated = _generate(
        (module, num_positions),
        params,
        sharding.put_batch(batch, mesh),
        np.array(prompt_ids, np.int32),
        settings,
        seed,
      )
    generated = jax.tree.map(sharding.local_rows, generated)
    matching.refuse_nan(generated.token_log_probs)
    # The positions of the words after the prompt.
    span = slice(len(prompt_ids), int(settings.max_length))
    return [
      _caption(tokenizer, generation.Generated(*row), text_prompt, span)
      for row in zip(*generated, strict=True)
    ]

  return generate


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
def _generate(module_and_positions, params, batch, prompt, settings, seed):
  """Generates captions; an image's samples depend on its own seed only."""
  module, num_positions = module_and_positions
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  keys = fold(jax.random.key(seed), batch["image_seeds"])
  generated = caption_lib.generate(
    module, params, batch["pixels"], prompt, settings, num_positions, keys
  )
  return jax.tree.map(
    lambda x: spmd.with_logical_constraint(
      x, ("batch", *[None] * (x.ndim - 1))
    ),
    generated,
  )
