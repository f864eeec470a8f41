"""How to decode: settings, and what they make of the scores of a token.

The semantics are those of transformers 4.15, which the original used: lengths
count the prompt, and what a beam is ranked by is divided by its whole length.

Dimensions: B texts, L room for a text, V vocabulary, c candidates.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

LENGTH_NORMS = ("full", "generated")
# Programs are compiled for texts of so many tokens or a multiple of it.
ROOM = 8


@struct.dataclass
class Decoding:
  """How to decode; `make` makes one and checks it.

  Numbers may change without another compilation, the others may not.

  Attributes:
    max_length: tokens of a text at most, prompt and [SEP] included.
    min_length: tokens before which no text ends, prompt included.
    repetition_penalty: of tokens that the text has already; 1 is none.
    temperature: scores are divided by it before a draw.
    top_p: draws are from the likeliest tokens with so much probability.
    num_beams: hypotheses that beam search keeps; 1 is greedy.
    num_return_sequences: texts of each image.
    sample: whether to draw, which leaves no beams.
    top_k: draws are from so many of the likeliest tokens; 0: from all.
    no_repeat_ngram_size: no n tokens in a row come twice; 0: they may.
    length_norm: what sums of log-probabilities are divided by, "full": all
      tokens but [SEP], or "generated": those after the prompt, as in today's
      transformers.
  """

  max_length: Any = 30
  min_length: Any = 10
  repetition_penalty: Any = 1.0
  temperature: Any = 1.0
  top_p: Any = 1.0
  num_beams: int = struct.field(pytree_node=False, default=3)
  num_return_sequences: int = struct.field(pytree_node=False, default=1)
  sample: bool = struct.field(pytree_node=False, default=False)
  top_k: int = struct.field(pytree_node=False, default=0)
  no_repeat_ngram_size: int = struct.field(pytree_node=False, default=0)
  length_norm: str = struct.field(pytree_node=False, default="full")


def make(
  defaults: Mapping[str, Any],
  prompt_length: int,
  max_positions: int,
  *,
  max_new_tokens: int | None = None,
  **options: Any,
) -> Decoding:
  """Settings, checked.

  Sampling starts from what the original fixes for it: one text, the 50
  likeliest tokens and a repetition penalty of 1.1; 0.9 is its top_p.

  Args:
    defaults: of the model; see `models.card`.
    prompt_length: [DEC] included.
    max_positions: tokens that the decoder has positions for.
    max_new_tokens: sets `max_length` from the prompt's.
    options: fields of `Decoding` that are wanted otherwise.

  Raises:
    ValueError: names the option that is unknown, or cannot be.
  """
  known = set(Decoding.__dataclass_fields__)
  for name in (*defaults, *options):
    if name not in known:
      raise ValueError(
        f"{name}: no option of decoding; there are {sorted(known)}"
      )
  if options.get("sample"):
    fixed = dict(num_beams=1, top_k=50, top_p=0.9, repetition_penalty=1.1)
    defaults = {**defaults, **fixed}
  if max_new_tokens is not None:
    if "max_length" in options:
      raise ValueError("max_new_tokens and max_length: give one of them")
    _at_least("max_new_tokens", max_new_tokens, 1)
    options["max_length"] = prompt_length + max_new_tokens
  settings = Decoding(**{**defaults, **options})
  if "min_length" not in options:
    # A default gives way to the length that is asked for.
    least = min(settings.min_length, settings.max_length)
    settings = settings.replace(min_length=least)
  _check(settings, prompt_length, max_positions)
  return settings


def _check(d: Decoding, prompt_length: int, max_positions: int) -> None:
  _at_least("num_beams", d.num_beams, 1)
  _at_least("num_return_sequences", d.num_return_sequences, 1)
  _at_least("min_length", d.min_length, 0)
  _at_least("top_k", d.top_k, 0)
  _at_least("no_repeat_ngram_size", d.no_repeat_ngram_size, 0)
  for name in ("repetition_penalty", "temperature", "top_p"):
    value = getattr(d, name)
    if not 0 < value < float("inf"):
      raise ValueError(f"{name}: expected a positive number, found {value}")
  if d.top_p > 1:
    raise ValueError(f"top_p: expected a share of at most 1, found {d.top_p}")
  if d.max_length <= prompt_length:
    raise ValueError(
      f"max_length: {d.max_length} tokens leave no room behind a prompt of "
      f"{prompt_length} ([DEC] counts); raise max_length (or give "
      "max_new_tokens), or shorten the prompt"
    )
  if d.max_length > max_positions:
    raise ValueError(
      f"max_length: {d.max_length} tokens, but the decoder has only "
      f"{max_positions} positions; lower max_length"
    )
  if d.min_length > d.max_length:
    raise ValueError(
      f"min_length: {d.min_length} is more than max_length, {d.max_length}; "
      "lower min_length or raise max_length"
    )
  if d.sample and d.num_beams > 1:
    raise ValueError(
      f"num_beams: {d.num_beams} beams cannot be sampled; set num_beams=1 or "
      "sample=False"
    )
  if not d.sample and d.num_return_sequences > d.num_beams:
    raise ValueError(
      f"num_return_sequences: {d.num_return_sequences} texts of an image from "
      f"{d.num_beams} beam(s); raise num_beams, or set sample=True"
    )
  if d.length_norm not in LENGTH_NORMS:
    raise ValueError(
      f"length_norm: expected one of {LENGTH_NORMS}, found {d.length_norm!r}"
    )


def _at_least(name: str, value: int, least: int) -> None:
  if value != int(value) or value < least:
    raise ValueError(f"{name}: expected {least} or more, found {value}")


def num_positions_for(max_length: int, max_positions: int) -> int:
  """The L of a program that serves `max_length`, among others."""
  return min(-(-max_length // ROOM) * ROOM, max_positions)


def process(
  scores: Float[Array, "B V"],
  ids: Int[Array, "B L"],
  position: Int[Array, ""],
  settings: Decoding,
  sep_id: int,
) -> Float[Array, "B V"]:
  """Scores of the token at `position`, without what the settings forbid."""
  d = settings
  scores = _penalise_repetition(scores, ids, position, d.repetition_penalty)
  if d.no_repeat_ngram_size:
    scores = _forbid_repeats(scores, ids, position, d.no_repeat_ngram_size)
  too_short = jnp.where(position < d.min_length, -jnp.inf, 0.0)
  return scores.at[:, sep_id].add(too_short)


def _penalise_repetition(scores, ids, position, penalty):
  rows = jnp.arange(len(ids))[:, None]
  found = jnp.take_along_axis(scores, ids, axis=-1)
  found = jnp.where(found < 0, found * penalty, found / penalty)
  # Nowhere for what is behind the text.
  written = jnp.arange(ids.shape[1])[None] < position
  column = jnp.where(written, ids, scores.shape[-1])
  return scores.at[rows, column].set(found, mode="drop")


def _forbid_repeats(scores, ids, position, n):
  """-inf for tokens that would end a sequence of n that was there before."""
  room = ids.shape[1]
  if room < n:
    return scores
  starts = jnp.arange(room - n + 1)
  before = ids[:, starts[:, None] + jnp.arange(n - 1)[None]]
  recent = jax.lax.dynamic_slice_in_dim(ids, position - n + 1, n - 1, axis=1)
  same = (before == recent[:, None]).all(axis=-1)
  # A slice before the beginning would be moved to it.
  same &= ((starts + n - 1)[None] < position) & (position >= n - 1)
  column = jnp.where(same, ids[:, n - 1 :], scores.shape[-1])
  rows = jnp.arange(len(ids))[:, None]
  return scores.at[rows, column].set(-jnp.inf, mode="drop")


def nucleus(
  scores: Float[Array, "B V"], settings: Decoding
) -> tuple[Float[Array, "B c"], Int[Array, "B c"]]:
  """The tokens that a draw may give, and their scores: -inf if it may not.

  The `top_k` likeliest first, of which those are left that come before the sum
  of probabilities exceeds `top_p`, and the one that makes it exceed.
  """
  number = min(settings.top_k, scores.shape[-1]) or scores.shape[-1]
  scores, tokens = jax.lax.top_k(scores / settings.temperature, number)
  probs = jax.nn.softmax(scores)
  before = jnp.cumsum(probs, axis=-1) - probs
  # The likeliest always stays, whatever rounding does.
  stays = (before <= settings.top_p) | (jnp.arange(number) == 0)[None]
  return jnp.where(stays, scores, -jnp.inf), tokens
