"""Writing text with a decoder: token by token, or by beams.

A program is compiled once for all steps, and stops early when every text has
ended.  What the decoder looks at is projected once, before the first step, and
never copied: the beams or samples of an image are rows that share its keys.

The semantics are those of transformers 4.15, which the original used: lengths
count the prompt, processors act on log-probabilities in beam search and on raw
scores elsewhere, and what a beam is ranked by is divided by its whole length.

Dimensions: I images, m texts of each, B = I * m of them, P prompt length,
L room for a text, V vocabulary, k beams, c candidates.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from blip_jax.models import med

LENGTH_NORMS = ("full", "generated")
# Programs are compiled for texts of so many tokens or a multiple of it.
ROOM = 8

Extend = Callable[
  [Int[Array, "B n"], med.Cache], tuple[Float[Array, "B V"], med.Cache]
]
# Tokens from processed scores, for the place of the text they are written to.
Pick = Callable[[Float[Array, "B V"], Int[Array, ""]], Int[Array, " B"]]


@struct.dataclass
class Decoding:
  """How to decode; `decoding` makes one and checks it.

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


class Generated(NamedTuple):
  """The texts of each image, the best first.

  Attributes:
    ids: prompt, text, [SEP] unless it was cut, and padding.
    token_log_probs: of each token after those before it, as the model alone
      sees it; 0 on prompt and padding.
    scores: what they are ranked by, log-probability per token; with a penalty
      or a minimal length, of what these made of it.
  """

  ids: Int[Array, "I m L"]
  token_log_probs: Float[Array, "I m L"]
  scores: Float[Array, "I m"]


def decoding(
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


def room_for(max_length: int, max_positions: int) -> int:
  """The L of a program that serves `max_length`, among others."""
  return min(-(-max_length // ROOM) * ROOM, max_positions)


def generate(
  model: nn.Module,
  params: med.Params,
  states: Float[Array, "I N E"],
  prompt: Int[Array, " P"],
  settings: Decoding,
  room: int,
  keys: Key[Array, " I"] | None = None,
  encoder_mask: Int[Array, "I N"] | None = None,
  pick: Pick | None = None,
) -> Generated:
  """Texts about images, or answers to questions.

  Args:
    model: with a text decoder, as `blip.Blip`.
    params: its own; those of pre-training tied.
    states: what the decoder looks at.
    prompt: what every text starts with, [DEC] first.
    room: L, no less than `max_length`.
    keys: one for each image, if texts are drawn; a draw depends on nothing
      but its image's key, so not on the images beside it.
    encoder_mask: which of `states` there are, if not all.
    pick: draws in another way.
  """
  apply = functools.partial(model.apply, {"params": params})
  # In the order in which the products of a step read them; a CPU would put all
  # of them into it at every step. The barrier keeps XLA from undoing that.
  stored = jax.lax.optimization_barrier(
    jax.tree.map(
      lambda x: x.transpose(0, 2, 3, 1),
      apply(states, method="project_for_decoder"),
    )
  )

  def extend(ids, cache):
    encoder_kv = jax.tree.map(lambda x: x.transpose(0, 3, 1, 2), stored)
    return apply(ids, cache, encoder_kv, encoder_mask, method="extend")

  num_images, tokens = len(states), model.config.med.tokens
  # All texts of an image have the prompt in common.
  cache = apply(num_images, room, method="init_cache")
  prompts = jnp.broadcast_to(prompt[None], (num_images, len(prompt)))
  logits, cache = extend(prompts, cache)
  search = _Search(extend, settings, len(prompt), tokens.sep, tokens.pad)
  ids = jnp.full((num_images, room), tokens.pad, jnp.int32)
  ids = ids.at[:, : len(prompt)].set(prompts)
  if settings.num_beams > 1:
    return search.beams(ids, logits, cache)
  if pick is None and settings.sample:
    pick = _drawing(keys, settings)
  return search.walk(ids, logits, cache, pick or _likeliest)


class _Search(NamedTuple):
  """What both ways of searching have in common."""

  extend: Extend
  settings: Decoding
  prompt_length: int
  sep_id: int
  pad_id: int

  def walk(self, ids, logits, cache, pick: Pick) -> Generated:
    """One text at a time: each token is picked for good."""
    d, number = self.settings, self.settings.num_return_sequences
    ids, logits = _repeat((ids, logits), number)
    cache = cache._replace(kv=_repeat(cache.kv, number))
    position = jnp.int32(self.prompt_length)
    log_probs = jnp.zeros(ids.shape, jnp.float32)
    done = jnp.zeros(len(ids), bool)
    length = jnp.full(len(ids), self.prompt_length)

    def write(text, logits):
      ids, log_probs, done, length, position = text
      processed = process(logits, ids, position, d, self.sep_id)
      token = jnp.where(done, self.pad_id, pick(processed, position))
      found = _of_tokens(jax.nn.log_softmax(logits), token)
      return (
        _put(ids, token.astype(jnp.int32), position),
        _put(log_probs, jnp.where(done, 0.0, found), position),
        done | (token == self.sep_id),
        length + ~done,
        position + 1,
      )

    def unfinished(carry):
      (_, _, done, _, position), _ = carry
      return (position < d.max_length) & ~done.all()

    def step(carry):
      text, cache = carry
      ids, *_, position = text
      logits, cache = self.extend(_last(ids, position), cache)
      return write(text, logits), cache

    start = write((ids, log_probs, done, length, position), logits), cache
    text, _ = jax.lax.while_loop(unfinished, step, start)
    ids, log_probs, done, length, _ = text
    # As for beams: all but [SEP], or what was generated.
    full = d.length_norm == "full"
    length = length - (done if full else self.prompt_length)
    scores = log_probs.sum(axis=-1) / length
    fold = lambda x: x.reshape(-1, number, *x.shape[1:])
    ids, log_probs, scores = map(fold, (ids, log_probs, scores))
    best = jnp.argsort(-scores, axis=-1, stable=True)
    return Generated(*(_select(x, best) for x in (ids, log_probs, scores)))

  def beams(self, ids, logits, cache) -> Generated:
    """The best k texts so far go on, side by side, until none can win."""
    d, k = self.settings, self.settings.num_beams
    num_images, room = ids.shape
    ids, logits = _repeat((ids, logits), k)
    cache = cache._replace(kv=_repeat(cache.kv, k))
    ids = ids.reshape(num_images, k, room)
    # All beams start as the same text, which must not be found k times.
    first = jnp.where(jnp.arange(k) == 0, 0.0, -1e9)
    texts = Generated(
      ids,
      jnp.zeros(ids.shape, jnp.float32),
      jnp.broadcast_to(first[None], ids.shape[:2]),
    )
    nothing = texts._replace(scores=jnp.full(ids.shape[:2], -jnp.inf))
    start = _Beams(
      texts,
      nothing,
      jnp.zeros(num_images, bool),
      jnp.int32(self.prompt_length),
    )

    def unfinished(carry):
      beams, _ = carry
      return (beams.position < d.max_length) & ~beams.done.all()

    def step(carry):
      beams, cache = carry
      last = _last(beams.open.ids.reshape(-1, room), beams.position)
      logits, cache = self.extend(last, cache)
      beams, came_from = self._next(beams, logits)
      return beams, _reorder(cache, came_from)

    beams, came_from = self._next(start, logits)
    start = beams, _reorder(cache, came_from)
    beams, _ = jax.lax.while_loop(unfinished, step, start)
    best = slice(0, d.num_return_sequences)
    return Generated(*(x[:, best] for x in beams.ended))

  def _next(self, beams, logits):
    """Lengthens the open texts by a token; which beams they came from."""
    d, k, position = self.settings, self.settings.num_beams, beams.position
    texts, ended, done = beams.open, beams.ended, beams.done
    num_images, _, room = texts.ids.shape
    log_probs = jax.nn.log_softmax(logits)
    processed = process(
      log_probs, texts.ids.reshape(-1, room), position, d, self.sep_id
    )
    # [SEP] of at most k of them ends a text, so that k others can go on.
    processed = processed.reshape(num_images, k, -1)
    total, beam, token = _best(processed + texts.scores[..., None], 2 * k)
    found = log_probs.reshape(num_images, k, -1)[
      jnp.arange(num_images)[:, None], beam, token
    ]
    texts = Generated(
      _put(_select(texts.ids, beam), token, position),
      _put(_select(texts.token_log_probs, beam), found, position),
      total,
    )
    is_sep = token == self.sep_id
    going_on = jnp.argsort(is_sep, axis=-1, stable=True)[:, :k]
    open_texts = Generated(*(_select(x, going_on) for x in texts))

    # Texts that have ended are ranked per token.
    if d.length_norm == "full":
      length, open_length, best = position, position + 1, total[:, 0]
    else:
      length = open_length = position + 1 - self.prompt_length
      best = open_texts.scores[:, 0]
    ends = is_sep & (jnp.arange(2 * k) < k)[None] & ~done[:, None]
    ended = _merge(ended, texts, ends, length)
    full = jnp.isfinite(ended.scores[:, -1])
    done = done | (full & (ended.scores[:, -1] >= best / length))
    # What is open when there is no more room ends there.
    cut = jnp.broadcast_to(
      ((position + 1 == d.max_length) & ~done)[:, None], (num_images, k)
    )
    ended = _merge(ended, open_texts, cut, open_length)
    return (
      _Beams(open_texts, ended, done, position + 1),
      _select(beam, going_on),
    )


class _Beams(NamedTuple):
  """Texts under way with their sums of log-probabilities, and texts that have
  ended with their ranks; `done` says whose open texts can no longer win."""

  open: Generated
  ended: Generated
  done: Bool[Array, " I"]
  position: Int[Array, ""]


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


def _likeliest(scores, position):
  return jnp.argmax(scores, axis=-1)


def _drawing(keys: Key[Array, " I"], settings: Decoding) -> Pick:
  """Draws of every image's every text, each from a key of its own."""
  number = jnp.arange(settings.num_return_sequences)
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  of_text = jax.vmap(fold, (0, None))(keys, number).reshape(-1)

  def draw(scores, position):
    scores, tokens = nucleus(scores, settings)
    of_token = jax.vmap(jax.random.fold_in, (0, None))(of_text, position)
    return _of_tokens(
      tokens, jax.vmap(jax.random.categorical)(of_token, scores)
    )

  return draw


def _best(scores, number):
  """The best of all beams' next tokens: (scores, beams, tokens).

  In two stages: selecting from few short rows is quicker than from a long one.
  """
  of_beam, tokens = jax.lax.top_k(scores, number)
  flat = lambda x: x.reshape(len(x), -1)
  total, place = jax.lax.top_k(flat(of_beam), number)
  return total, place // number, _select(flat(tokens), place)


def _merge(ended, texts, ends, length):
  """The best k of texts that have ended and those that now do."""
  scores = jnp.where(ends, texts.scores / length, -jnp.inf)
  both = jax.tree.map(
    lambda *x: jnp.concatenate(x, axis=1),
    ended,
    texts._replace(scores=scores),
  )
  # The earlier wins a tie.
  _, best = jax.lax.top_k(both.scores, ended.scores.shape[1])
  return Generated(*(_select(x, best) for x in both))


def _reorder(cache: med.Cache, came_from: Int[Array, "I k"]) -> med.Cache:
  """The cache of texts that came from other beams of the same image."""
  shape = came_from.shape
  move = lambda x: _select(x.reshape(*shape, *x.shape[1:]), came_from).reshape(
    x.shape
  )
  return cache._replace(kv=jax.tree.map(move, cache.kv))


def _select(x: Array, index: Int[Array, "I c"]) -> Array:
  """Rows of the second axis."""
  index = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1)


def _repeat(tree: Any, number: int) -> Any:
  return jax.tree.map(lambda x: jnp.repeat(x, number, axis=0), tree)


def _put(x: Array, value: Array, position: Int[Array, ""]) -> Array:
  """Writes at a place of the last axis."""
  return jax.lax.dynamic_update_index_in_dim(x, value, position, axis=-1)


def _last(ids: Int[Array, "B L"], position: Int[Array, ""]) -> Array:
  return jax.lax.dynamic_slice_in_dim(ids, position - 1, 1, axis=1)


def _of_tokens(x: Array, token: Int[Array, " B"]) -> Array:
  return jnp.take_along_axis(x, token[:, None], axis=-1)[:, 0]
