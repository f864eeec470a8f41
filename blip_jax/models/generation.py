"""Writing text with a decoder: token by token, or by beams.

A program is compiled once for all steps, and stops early when every text has
ended.  What the decoder looks at is projected once, before the first step, and
never copied: the beams or samples of an image are rows that share its keys.

As in transformers 4.15, which the original used, processors act on
log-probabilities in beam search and on raw scores elsewhere; `decoding.py` has
what they do.

Dimensions: I images, m texts of each, B = I * m of them, P prompt length,
L room for a text, V vocabulary, k beams, c of a second axis.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from blip_jax.models import decoding, med

Extend = Callable[
  [Int[Array, "B n"], med.Cache], tuple[Float[Array, "B V"], med.Cache]
]
# Tokens from processed scores, for the place of the text they are written to.
Pick = Callable[[Float[Array, "B V"], Int[Array, ""]], Int[Array, " B"]]


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


def generate(
  model: nn.Module,
  params: med.Params,
  states: Float[Array, "I N E"],
  prompt: Int[Array, " P"],
  settings: decoding.Decoding,
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
      apply(states, method="decoder_kv"),
    )
  )

  def extend(ids, cache):
    encoder_kv = jax.tree.map(lambda x: x.transpose(0, 3, 1, 2), stored)
    return apply(ids, cache, encoder_kv, encoder_mask, method="extend")

  num_images, tokens = len(states), model.config.med.tokens
  many = max(settings.num_beams, settings.num_return_sequences)
  # All texts of an image have the prompt in common.
  cache = apply(num_images, room, many, method="init_cache")
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
  settings: decoding.Decoding
  prompt_length: int
  sep_id: int
  pad_id: int

  def walk(self, ids, logits, cache, pick: Pick) -> Generated:
    """One text at a time: each token is picked for good."""
    d, number = self.settings, self.settings.num_return_sequences
    ids, logits = _repeat((ids, logits), number)
    position = jnp.int32(self.prompt_length)
    log_probs = jnp.zeros(ids.shape, jnp.float32)
    done = jnp.zeros(len(ids), bool)
    length = jnp.full(len(ids), self.prompt_length)

    def write(text, logits):
      ids, log_probs, done, length, position = text
      processed = decoding.process(logits, ids, position, d, self.sep_id)
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
      return beams, _go_on(cache, came_from)

    beams, came_from = self._next(start, logits)
    start = beams, _go_on(cache, came_from)
    beams, _ = jax.lax.while_loop(unfinished, step, start)
    best = slice(0, d.num_return_sequences)
    return Generated(*(x[:, best] for x in beams.ended))

  def _next(self, beams, logits):
    """Lengthens the open texts by a token; which beams they came from."""
    d, k, position = self.settings, self.settings.num_beams, beams.position
    texts, ended, done = beams.open, beams.ended, beams.done
    num_images, _, room = texts.ids.shape
    log_probs = jax.nn.log_softmax(logits)
    processed = decoding.process(
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


def _likeliest(scores, position):
  return jnp.argmax(scores, axis=-1)


def _drawing(keys: Key[Array, " I"], settings: decoding.Decoding) -> Pick:
  """Draws of every image's every text, each from a key of its own."""
  number = jnp.arange(settings.num_return_sequences)
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  of_text = jax.vmap(fold, (0, None))(keys, number).reshape(-1)

  def draw(scores, position):
    scores, tokens = decoding.nucleus(scores, settings)
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


def _go_on(cache: med.Cache, came_from: Int[Array, "I k"]) -> med.Cache:
  """The cache of texts that came from other beams of the same image."""
  return cache._replace(ancestors=_select(cache.ancestors, came_from))


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
