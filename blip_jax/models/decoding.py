"""Decoding settings, and the processing of next-token scores.

The semantics are those of transformers 4.15, which the original used: lengths
count the prompt, and beam scores are divided by the length of the entire text.

Dimensions: B texts, L positions of a text, V vocabulary, c candidate tokens.
"""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

LENGTH_NORMS = ("full", "generated")
# Programs are compiled for multiples of this number of positions, so that
# similar lengths share one program.
POSITIONS_MULTIPLE = 8
# Options that are whole numbers, and the least of each.
_WHOLE = {
  "max_length": 0,
  "min_length": 0,
  "num_beams": 1,
  "num_return_sequences": 1,
  "top_k": 0,
  "no_repeat_ngram_size": 0,
}
# Of what divides or multiplies scores: float32 holds the results, and all of
# them are numbers.
_LEAST, _MOST = 1e-12, 1e12


@struct.dataclass
class Decoding:
  """Decoding settings; `make` creates and checks them.

  The first five fields, annotated with Any, are inputs of a compiled program;
  changing another field compiles a new one.

  Attributes:
    max_length: maximum number of tokens of a text, prompt and [SEP] included.
    min_length: minimum number of tokens before [SEP], prompt included.
    repetition_penalty: for tokens that the text already contains (Keskar et
      al., 2019); 1 disables it.
    temperature: divides scores before sampling.
    top_p: samples from the most likely tokens whose probabilities sum up to
      this (nucleus sampling); 1 disables it.
    num_beams: number of beams of beam search; 1 is greedy decoding.
    num_return_sequences: number of texts for each image.
    sample: whether to sample; not together with beam search.
    top_k: samples from the top_k most likely tokens; 0 disables it.
    no_repeat_ngram_size: no sequence of this number of tokens is repeated; 0
      disables it.
    length_norm: which tokens count in the length by which the sum of
      log-probabilities is divided. "full": all tokens but [SEP]. "generated":
      those after the prompt, as in recent versions of transformers.
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
  """Returns checked settings.

  With `sample`, the defaults are those of the original: one beam, top_k=50,
  top_p=0.9 and a repetition penalty of 1.1.

  Args:
    defaults: default options of the model; see `models.card`.
    prompt_length: number of prompt tokens, [DEC] included.
    max_positions: number of position embeddings of the decoder.
    max_new_tokens: sets `max_length` to the prompt's length plus this.
    options: fields of `Decoding` that override the defaults.

  Raises:
    ValueError: an option is unknown, out of range, or conflicts with another.
  """
  known = set(Decoding.__dataclass_fields__)
  for name in (*defaults, *options):
    if name not in known:
      raise ValueError(
        f"{name}: no such decoding option; expected one of {sorted(known)}"
      )
  if options.get("sample"):
    fixed = dict(num_beams=1, top_k=50, top_p=0.9, repetition_penalty=1.1)
    defaults = {**defaults, **fixed}
  if max_new_tokens is not None:
    if "max_length" in options:
      raise ValueError("max_new_tokens and max_length: give only one of them")
    at_least("max_new_tokens", max_new_tokens, 1)
    options["max_length"] = prompt_length + max_new_tokens
  chosen = {**defaults, **options}
  for name, least in _WHOLE.items():
    if name in chosen:
      at_least(name, chosen[name], least)
  settings = Decoding(**chosen)
  if "min_length" not in options:
    # The user's max_length takes precedence over a default min_length.
    least = min(settings.min_length, settings.max_length)
    settings = dataclasses.replace(settings, min_length=least)
  _check(settings, prompt_length, max_positions)
  return settings


def _check(d: Decoding, prompt_length: int, max_positions: int) -> None:
  for name in ("repetition_penalty", "temperature", "top_p"):
    value = getattr(d, name)
    is_number = issubclass(type(value), numbers.Real)
    if not is_number or not _LEAST <= value <= _MOST:
      raise ValueError(
        f"{name}: expected a positive number, from {_LEAST:g} to {_MOST:g}, "
        f"found {value!r}"
      )
  if d.top_p > 1:
    raise ValueError(f"top_p: expected at most 1, found {d.top_p}")
  if d.max_length <= prompt_length:
    raise ValueError(
      f"max_length: {d.max_length} tokens leave no room after a prompt of "
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


def at_least(name: str, value: Any, least: int) -> None:
  """Raises `ValueError` unless an option is a whole number from `least` on."""
  try:
    is_whole = value == int(value)
  except (TypeError, ValueError, OverflowError):
    is_whole = False
  if not is_whole:
    raise ValueError(f"{name}: expected a whole number, found {value!r}")
  if value < least:
    raise ValueError(f"{name}: expected {least} or more, found {value}")


def num_positions_for(max_length: int, max_positions: int) -> int:
  """Number of positions, L, to compile a program for.

  Rounds `max_length` up, so that similar lengths share one program.
  """
  multiple = POSITIONS_MULTIPLE
  return min(-(-max_length // multiple) * multiple, max_positions)


def process(
  scores: Float[Array, "B V"],
  ids: Int[Array, "B L"],
  position: Int[Array, ""],
  settings: Decoding,
  sep_id: int,
) -> Float[Array, "B V"]:
  """Applies repetition penalty, n-gram ban and minimum length.

  Args:
    scores: logits or log-probabilities of the token at `position`.
    ids: the texts, of which the tokens before `position` count.
    position: index of the next token.
    settings: see `Decoding`.
    sep_id: id of [SEP].

  Returns:
    The processed scores; -inf for tokens that are not allowed.
  """
  d = settings
  scores = _penalise_repetition(scores, ids, position, d.repetition_penalty)
  if d.no_repeat_ngram_size:
    scores = _ban_repeated_ngrams(scores, ids, position, d.no_repeat_ngram_size)
  too_short = jnp.where(position < d.min_length, -jnp.inf, 0.0)
  return scores.at[:, sep_id].add(too_short)


def _penalise_repetition(scores, ids, position, penalty):
  rows = jnp.arange(ids.shape[0])[:, None]
  penalised = jnp.take_along_axis(scores, ids, axis=-1)
  penalised = jnp.where(penalised < 0, penalised * penalty, penalised / penalty)
  # Positions after the text point at a column that does not exist, which
  # `mode="drop"` ignores.
  in_text = jnp.arange(ids.shape[1])[None] < position
  column = jnp.where(in_text, ids, scores.shape[-1])
  return scores.at[rows, column].set(penalised, mode="drop")


def _ban_repeated_ngrams(scores, ids, position, n):
  """Sets tokens that would complete an earlier n-gram again to -inf."""
  num_positions = ids.shape[1]
  if num_positions < n:
    return scores
  starts = jnp.arange(num_positions - n + 1)
  earlier = ids[:, starts[:, None] + jnp.arange(n - 1)[None]]
  recent = jax.lax.dynamic_slice_in_dim(ids, position - n + 1, n - 1, axis=1)
  same = (earlier == recent[:, None]).all(axis=-1)
  # A text shorter than n - 1 has no n-gram: the slice above would start before
  # position 0, and JAX moves it to position 0.
  same &= ((starts + n - 1)[None] < position) & (position >= n - 1)
  column = jnp.where(same, ids[:, n - 1 :], scores.shape[-1])
  rows = jnp.arange(ids.shape[0])[:, None]
  return scores.at[rows, column].set(-jnp.inf, mode="drop")


def nucleus(
  scores: Float[Array, "B V"], settings: Decoding
) -> tuple[Float[Array, "B c"], Int[Array, "B c"]]:
  """Candidate tokens for sampling, after temperature, top_k and top_p.

  Of the `top_k` most likely tokens, the smallest set is kept whose
  probabilities, taken in descending order, sum up to more than `top_p`.

  Returns:
    Scores, -inf for tokens that must not be sampled, and the tokens' ids.
  """
  num_candidates = min(settings.top_k, scores.shape[-1]) or scores.shape[-1]
  scores, tokens = jax.lax.top_k(scores / settings.temperature, num_candidates)
  probs = jax.nn.softmax(scores)
  preceding = jnp.cumsum(probs, axis=-1) - probs
  # The most likely token is always kept, whatever the rounding error is.
  most_likely = (jnp.arange(num_candidates) == 0)[None]
  kept = (preceding <= settings.top_p) | most_likely
  return jnp.where(kept, scores, -jnp.inf), tokens
