"""Answers to questions, from a decoder that attends to the questions' states.

An answer is one of a list, found by `rank`, or any text, by `generate` (paper,
section 5.3).

Dimensions: I questions, N length of a question, E width, M answers of the list,
L length of an answer, k answers on the short list, m scored together, V
vocabulary.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from blip_jax.models import decoding, generation, med, stepwise
from blip_jax.tasks import losses

# How `Ranked.scores` compares answers.
SCORES = ("blip", "albef")
# Answers of a question that are scored at once. A block takes as many steps as
# its longest answer has tokens, and blocks are sorted by length.
AT_ONCE = 16


class Ranked(NamedTuple):
  """The short list of each question, sorted by the first token.

  Attributes:
    index: of the answers, in the list.
    first_prob: probability of the first token.
    nll: negative log-probability of the answer, [SEP] included.
    uniform: cross-entropy of its tokens with the uniform distribution.
  """

  index: Int[Array, "I k"]
  first_prob: Float[Array, "I k"]
  nll: Float[Array, "I k"]
  uniform: Float[Array, "I k"]

  @property
  def probs(self) -> Float[Array, "I k"]:
    """Probabilities among the short list; they sum to 1."""
    return jax.nn.softmax(-self.nll, axis=-1)

  def loss(self, label_smoothing: float) -> Float[Array, "I k"]:
    """The training loss of each answer, summed over its tokens."""
    return (1 - label_smoothing) * self.nll + label_smoothing * self.uniform

  def scores(
    self, rank_score: str, label_smoothing: float
  ) -> Float[Array, "I k"]:
    """What the answers of a question are ranked by, the higher the better.

    Args:
      rank_score: "blip": the negative training loss, label smoothing included,
        which is not divided by the length. "albef", as in the predecessor of
        BLIP: the log-probability, in which the first token counts twice.
      label_smoothing: of training.
    """
    if rank_score == "blip":
      return -self.loss(label_smoothing)
    return jnp.log(self.first_prob) - self.nll


def rank(
  model: nn.Module,
  params: med.Params,
  states: Float[Array, "I N E"],
  question_mask: Int[Array, "I N"],
  answer_ids: Int[Array, "M L"],
  answer_lengths: Int[Array, " M"],
  k: int,
) -> Ranked:
  """Scores the answers of a list whose first tokens are the likeliest.

  The decoder sees [DEC] once a question, and projects the question's states
  once. Only the k answers on its short list are decoded, and short ones end
  early: nothing has the size of the list but the probabilities of their first
  tokens.

  Args:
    model: with a decoder that attends to questions.
    params: of the model.
    states: of the questions.
    question_mask: 1 on the tokens of the questions.
    answer_ids: [CLS], answer, [SEP] and padding.
    answer_lengths: tokens of each answer without padding, at least 3.
    k: answers on the short list, at most M.
  """
  num_questions, length = states.shape[0], answer_ids.shape[1]
  at_once = min(k, AT_ONCE)
  decoder = stepwise.make(model, params, states, question_mask)
  cache = decoder.init_cache(length, at_once)
  dec = jnp.full((num_questions, 1), model.config.med.tokens.dec)
  logits, cache = decoder.extend(dec, cache)
  probs = jax.nn.softmax(logits)[:, answer_ids[:, 1]]
  first_prob, index = jax.lax.top_k(probs, k)

  # Short answers first; the last block is filled with the longest one.
  order = jnp.argsort(answer_lengths[index], axis=1, stable=True)
  short_first = jnp.take_along_axis(index, order, axis=1)
  filling = -k % at_once
  short_first = jnp.pad(short_first, ((0, 0), (0, filling)), mode="edge")
  blocks = short_first.reshape(num_questions, -1, at_once).swapaxes(0, 1)

  def score(block: Int[Array, "I m"]) -> tuple[Any, Any]:
    ids = answer_ids[block].reshape(-1, length)
    lengths = answer_lengths[block].reshape(-1)

    def unfinished(carry):
      position, *_ = carry
      return position + 1 < lengths.max()

    def step(carry):
      position, cache, sums = carry
      token = jax.lax.dynamic_slice_in_dim(ids, position, 1, axis=1)
      logits, cache = decoder.extend(token, cache)
      label = jax.lax.dynamic_index_in_dim(ids, position + 1, 1, False)
      is_token = position + 1 < lengths
      sums = jax.tree.map(
        lambda total, x: total + jnp.where(is_token, x, 0),
        sums,
        losses.token_losses(logits, label),
      )
      return position + 1, cache, sums

    repeated = jnp.repeat(logits, at_once, axis=0)
    first = losses.token_losses(repeated, ids[:, 1])
    _, _, sums = jax.lax.while_loop(unfinished, step, (1, cache, first))
    nll, uniform = (x.reshape(block.shape) for x in sums)
    return nll, uniform

  # From blocks back to the order of the short list.
  place = jnp.argsort(order, axis=1)
  nll, uniform = (
    jnp.take_along_axis(
      x.swapaxes(0, 1).reshape(num_questions, -1), place, axis=1
    )
    for x in jax.lax.map(score, blocks)
  )
  return Ranked(index, first_prob, nll, uniform)


def settings(
  defaults: Mapping[str, Any], max_positions: int, **options: Any
) -> decoding.Decoding:
  """Returns how answers are generated; as `decoding.make`, but not sampled."""
  made = decoding.make(defaults, 1, max_positions, **options)
  if made.sample:
    raise ValueError(
      "sample: answers are found by beam search; leave out sample=True"
    )
  return made


def generate(
  model: nn.Module,
  params: med.Params,
  states: Float[Array, "I N E"],
  question_mask: Int[Array, "I N"],
  settings: decoding.Decoding,
  num_positions: int,
  legacy_mask: bool = False,
) -> generation.Generated:
  """Generates answers; see `generation.generate`.

  Args:
    legacy_mask: attends to the padding of questions too, as the original does
      here, though neither in training nor in ranking.
  """
  dec = jnp.array([model.config.med.tokens.dec], jnp.int32)
  mask = None if legacy_mask else question_mask
  return generation.generate(
    model, params, states, dec, settings, num_positions, encoder_mask=mask
  )
