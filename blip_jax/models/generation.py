"""Text generation with a decoder: greedy, by sampling, or by beam search.

All steps run in one compiled loop, which stops when every text has ended.
Cross-attention keys and values are computed once, before the first step, and
never copied: all beams or samples of an image use the same ones.

As in transformers 4.15, which the original used, score processing (see
`decoding.py`) is applied to log-probabilities in beam search, and to logits in
greedy decoding and sampling.

Dimensions: I images, m texts of each, B = I * m texts, P prompt length, L
positions of a text, V vocabulary, k beams, N image tokens, E image width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from blip_jax.models import cache as cache_lib
from blip_jax.models import decoding, med, stepwise

# (processed scores, position) -> tokens at that position.
Pick = Callable[[Float[Array, "B V"], Int[Array, ""]], Int[Array, " B"]]


class Generated(NamedTuple):
  """Texts of each image, sorted by score in descending order.

  Attributes:
    ids: prompt, text, [SEP] unless `max_length` truncated the text, and
      padding.
    token_log_probs: log-probability of each token given the preceding ones,
      according to the model, before any score processing; 0 on prompt and
      padding.
    scores: log-probability per token. Beam search uses the processed scores,
      that is, with repetition penalty and minimum length applied.
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
  num_positions: int,
  keys: Key[Array, " I"] | None = None,
  encoder_mask: Int[Array, "I N"] | None = None,
  pick: Pick | None = None,
) -> Generated:
  """Generates captions of images, or answers to questions.

  Args:
    model: a model with a text decoder, such as `blip.Blip`.
    params: its parameters; those of pre-training must be tied (`tying.tie`).
    states: image tokens, or hidden states of questions, to attend to.
    prompt: the prefix of every text, starting with [DEC].
    settings: see `decoding.make`.
    num_positions: L, at least `settings.max_length`.
    keys: one key per image; needed only if `settings.sample`. The samples of
      an image depend on its key alone, not on the rest of the batch.
    encoder_mask: 1 on the states to attend to; all of them by default.
    pick: chooses tokens in greedy decoding or sampling, instead of `settings`.

  Raises:
    ValueError: the settings ask for samples, but there are no keys, or there
      are too many beams.
  """
  # Each beam offers twice as many tokens as there are beams.
  most_beams = model.config.med.vocab_size // 2
  if settings.num_beams > most_beams:
    raise ValueError(
      f"num_beams: expected at most {most_beams}, half of the tokens of the "
      f"vocabulary, found {settings.num_beams}"
    )
  decoder = stepwise.make(model, params, states, encoder_mask)
  num_images, tokens = states.shape[0], model.config.med.tokens
  texts_per_image = max(settings.num_beams, settings.num_return_sequences)
  cache = decoder.init_cache(num_positions, texts_per_image)
  # The texts of an image share the prompt, which is decoded once.
  prompts = jnp.broadcast_to(prompt[None], (num_images, len(prompt)))
  logits, cache = decoder.extend(prompts, cache)
  generator = _Generator(
    decoder.extend, settings, len(prompt), tokens.sep, tokens.pad
  )
  ids = jnp.full((num_images, num_positions), tokens.pad, jnp.int32)
  ids = ids.at[:, : len(prompt)].set(prompts)
  if settings.num_beams > 1:
    return generator.beam_search(ids, logits, cache)
  if pick is None and settings.sample:
    if keys is None:
      raise ValueError("sampling needs `keys`, one for each image")
    pick = _sampler(keys, settings)
  return generator.token_by_token(ids, logits, cache, pick or _most_likely)


class _Generator(NamedTuple):
  """What the two decoding loops share."""

  extend: stepwise.Extend
  settings: decoding.Decoding
  prompt_length: int
  sep_id: int
  pad_id: int

  def token_by_token(self, ids, logits, cache, pick: Pick) -> Generated:
    """Greedy decoding or sampling, of all texts in parallel.

    Args:
      ids: the prompt of each image, and padding; [I, L].
      logits: of the first token after the prompt; [I, V].
      cache: with the prompt.
      pick: chooses the tokens of a step.
    """
    d, num_texts = self.settings, self.settings.num_return_sequences
    ids, logits = _repeat((ids, logits), num_texts)
    position = jnp.int32(self.prompt_length)
    log_probs = jnp.zeros(ids.shape, jnp.float32)
    done = jnp.zeros(ids.shape[0], bool)
    length = jnp.full(ids.shape[0], self.prompt_length)

    def append_token(texts, logits):
      ids, log_probs, done, length, position = texts
      processed = decoding.process(logits, ids, position, d, self.sep_id)
      token = jnp.where(done, self.pad_id, pick(processed, position))
      log_prob = _take_tokens(jax.nn.log_softmax(logits), token)
      return (
        _set_position(ids, token.astype(jnp.int32), position),
        _set_position(log_probs, jnp.where(done, 0.0, log_prob), position),
        done | (token == self.sep_id),
        length + ~done,
        position + 1,
      )

    def unfinished(carry):
      (_, _, done, _, position), _ = carry
      return (position < d.max_length) & ~done.all()

    def step(carry):
      texts, cache = carry
      ids, *_, position = texts
      logits, cache = self.extend(_last_token(ids, position), cache)
      return append_token(texts, logits), cache

    texts = ids, log_probs, done, length, position
    start = append_token(texts, logits), cache
    texts, _ = jax.lax.while_loop(unfinished, step, start)
    ids, log_probs, done, length, _ = texts
    # The same norms as in beam search; `done` is 1 if there is a [SEP].
    full = d.length_norm == "full"
    length = length - (done if full else self.prompt_length)
    scores = log_probs.sum(axis=-1) / length
    fold = lambda x: x.reshape(-1, num_texts, *x.shape[1:])
    ids, log_probs, scores = map(fold, (ids, log_probs, scores))
    order = jnp.argsort(-scores, axis=-1, stable=True)
    return Generated(*(_select(x, order) for x in (ids, log_probs, scores)))

  def beam_search(self, ids, logits, cache) -> Generated:
    """Extends the k best open texts until none of them can be among the best.

    Args:
      ids: the prompt of each image, and padding; [I, L].
      logits: of the first token after the prompt; [I, V].
      cache: with the prompt.
    """
    d, k = self.settings, self.settings.num_beams
    num_images, num_positions = ids.shape
    ids, logits = _repeat((ids, logits), k)
    ids = ids.reshape(num_images, k, num_positions)
    # All beams start as the same text; without this they would stay equal.
    first = jnp.where(jnp.arange(k) == 0, 0.0, -1e9)
    texts = Generated(
      ids,
      jnp.zeros(ids.shape, jnp.float32),
      jnp.broadcast_to(first[None], ids.shape[:2]),
    )
    none_ended = texts._replace(scores=jnp.full(ids.shape[:2], -jnp.inf))
    start = _Beams(
      texts,
      none_ended,
      jnp.zeros(num_images, bool),
      jnp.int32(self.prompt_length),
    )

    def unfinished(carry):
      beams, _ = carry
      return (beams.position < d.max_length) & ~beams.done.all()

    def step(carry):
      beams, cache = carry
      ids = beams.open.ids.reshape(-1, num_positions)
      logits, cache = self.extend(_last_token(ids, beams.position), cache)
      beams, parents = self._next(beams, logits)
      return beams, _reorder(cache, parents)

    beams, parents = self._next(start, logits)
    start = beams, _reorder(cache, parents)
    beams, _ = jax.lax.while_loop(unfinished, step, start)
    best = slice(0, d.num_return_sequences)
    return Generated(*(x[:, best] for x in beams.ended))

  def _next(self, beams, logits):
    """Extends the open texts by one token.

    Args:
      beams: all texts.
      logits: of the next token of the open ones; [I * k, V].

    Returns:
      All texts, and for each open one the index of the beam that it continues.
    """
    d, k, position = self.settings, self.settings.num_beams, beams.position
    texts, ended, done = beams.open, beams.ended, beams.done
    num_images, _, num_positions = texts.ids.shape
    log_probs = jax.nn.log_softmax(logits)
    processed = decoding.process(
      log_probs, texts.ids.reshape(-1, num_positions), position, d, self.sep_id
    )
    # Each beam has one [SEP], so at least k of the best 2k do not end a text.
    processed = processed.reshape(num_images, k, -1)
    total, beam, token = _best(processed + texts.scores[..., None], 2 * k)
    log_prob = log_probs.reshape(num_images, k, -1)[
      jnp.arange(num_images)[:, None], beam, token
    ]
    texts = Generated(
      _set_position(_select(texts.ids, beam), token, position),
      _set_position(_select(texts.token_log_probs, beam), log_prob, position),
      total,
    )
    is_sep = token == self.sep_id
    still_open = jnp.argsort(is_sep, axis=-1, stable=True)[:, :k]
    open_texts = Generated(*(_select(x, still_open) for x in texts))

    # Texts that have ended are ranked by log-probability per token.
    if d.length_norm == "full":
      length, open_length, best = position, position + 1, total[:, 0]
    else:
      length = open_length = position + 1 - self.prompt_length
      best = open_texts.scores[:, 0]
    # As in transformers, a [SEP] counts only among the best k candidates.
    ends = is_sep & (jnp.arange(2 * k) < k)[None] & ~done[:, None]
    ended = _merge(ended, texts, ends, length)
    full = jnp.isfinite(ended.scores[:, -1])
    done = done | (full & (ended.scores[:, -1] >= best / length))
    # Texts that are still open at `max_length` end there, without [SEP].
    truncated = jnp.broadcast_to(
      ((position + 1 == d.max_length) & ~done)[:, None], (num_images, k)
    )
    ended = _merge(ended, open_texts, truncated, open_length)
    return (
      _Beams(open_texts, ended, done, position + 1),
      _select(beam, still_open),
    )


class _Beams(NamedTuple):
  """The state of beam search.

  Attributes:
    open: unfinished texts; their scores are sums of log-probabilities.
    ended: finished texts; their scores are divided by the length.
    done: images whose open texts can no longer be among the best.
    position: index of the next token.
  """

  open: Generated
  ended: Generated
  done: Bool[Array, " I"]
  position: Int[Array, ""]


def _most_likely(scores, position):
  return jnp.argmax(scores, axis=-1)


def _sampler(keys: Key[Array, " I"], settings: decoding.Decoding) -> Pick:
  """Samples tokens, with a separate key for each image, text and position."""
  number = jnp.arange(settings.num_return_sequences)
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  text_keys = jax.vmap(fold, (0, None))(keys, number).reshape(-1)

  def sample(scores, position):
    scores, tokens = decoding.nucleus(scores, settings)
    token_keys = jax.vmap(jax.random.fold_in, (0, None))(text_keys, position)
    return _take_tokens(
      tokens, jax.vmap(jax.random.categorical)(token_keys, scores)
    )

  return sample


def _best(scores, number):
  """The best next tokens of all beams: (scores, beams, tokens).

  In two stages, because top-k of a few short rows is faster than of one long
  row.

  Args:
    scores: [I, k, V].
    number: how many for each image.
  """
  beam_scores, tokens = jax.lax.top_k(scores, number)
  flat = lambda x: x.reshape(x.shape[0], -1)
  total, index = jax.lax.top_k(flat(beam_scores), number)
  return total, index // number, _select(flat(tokens), index)


def _merge(ended, texts, ends, length):
  """The best k of the ended texts and those of `texts` where `ends` is true."""
  scores = jnp.where(ends, texts.scores / length, -jnp.inf)
  both = jax.tree.map(
    lambda *x: jnp.concatenate(x, axis=1),
    ended,
    texts._replace(scores=scores),
  )
  # In a tie, top_k prefers the text that ended earlier.
  _, best = jax.lax.top_k(both.scores, ended.scores.shape[1])
  return Generated(*(_select(x, best) for x in both))


def _reorder(
  cache: cache_lib.Cache, parents: Int[Array, "I k"]
) -> cache_lib.Cache:
  """The cache after each text has become a continuation of its parent beam."""
  return cache._replace(ancestors=_select(cache.ancestors, parents))


def _select(x: Array, index: Int[Array, "I c"]) -> Array:
  """Selects entries of the second axis, for each image."""
  index = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1)


def _repeat(tree: Any, number: int) -> Any:
  return jax.tree.map(lambda x: jnp.repeat(x, number, axis=0), tree)


def _set_position(x: Array, value: Array, position: Int[Array, ""]) -> Array:
  """Sets one index of the last axis."""
  return jax.lax.dynamic_update_index_in_dim(x, value, position, axis=-1)


def _last_token(ids: Int[Array, "B L"], position: Int[Array, ""]) -> Array:
  """The token before `position`, as [B, 1]."""
  return jax.lax.dynamic_slice_in_dim(ids, position - 1, 1, axis=1)


def _take_tokens(x: Array, token: Int[Array, " B"]) -> Array:
  """The entry of each row of `x` [B, V] at its token."""
  return jnp.take_along_axis(x, token[:, None], axis=-1)[:, 0]
