"""The losses of all tasks, as functions of arrays (paper, section 3.2).

Dimensions: B batch, G groups of b examples each (B = G * b; see `grouped`), K
candidates, L text length, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from blip_jax.models import predictions

# Label of tokens that are not predicted, as in PyTorch.
IGNORE = -100


def grouped(x: Shaped[Array, "B ..."], groups: int) -> Shaped[Array, "G b ..."]:
  """Splits a batch into groups; examples are negatives only within a group.

  A single group is the entire batch.  One group per data shard reproduces the
  original's distributed training, in which a rank never sees the current batch
  of another rank.
  """
  return x.reshape(groups, x.shape[0] // groups, *x.shape[1:])


def itc_loss(
  sim: Float[Array, "*B K"], targets: Float[Array, "*B K"]
) -> Float[Array, ""]:
  """Mean cross-entropy with soft targets, of similarities divided by `temp`."""
  return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(sim, axis=-1), axis=-1))


def hard_negative_weights(
  sim: Float[Array, "G b b"], same: Bool[Array, "#G b b"], constant: float
) -> Float[Array, "G b b"]:
  """Weights for sampling hard negatives, zero for positives.

  Args:
    sim: similarities within each group; row i is for the negatives of example
      i. No gradient flows through them.
    same: true for positives, which are never sampled.
    constant: added to the softmax of the similarities, so that every negative
      may be sampled even if its softmax underflows.
  """
  sim = jax.lax.stop_gradient(sim)
  return jnp.where(same, 0.0, jax.nn.softmax(sim, axis=-1) + constant)


def sample_negatives(
  key: PRNGKeyArray, weights: Float[Array, "G b b"]
) -> Int[Array, "G b"]:
  """Samples one column per row with probability proportional to its weight.

  Returns:
    Indices within each group; a row without any weight gets an arbitrary one.
  """
  return jax.random.categorical(key, jnp.log(weights), axis=-1)


def take_in_group(
  x: Shaped[Array, "B ..."], index: Int[Array, "G b"]
) -> Shaped[Array, "B ..."]:
  """Selects examples of `x` by their index within the group.

  If groups are data shards, this needs no communication between devices, while
  a plain `x[index]` would gather the entire batch on all of them.
  """
  rows = jax.vmap(lambda rows, i: rows[i])(grouped(x, index.shape[0]), index)
  return rows.reshape(x.shape)


def classification_loss(
  logits: Float[Array, "n 2"],
  labels: Int[Array, " n"],
  valid: Bool[Array, " n"],
  num_valid: Int[Array, ""] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Mean cross-entropy of the valid examples, and their accuracy.

  Args:
    logits: of (0, 1).
    labels: 0 or 1.
    valid: which examples count.
    num_valid: of the batch of which these are a part; by default their own.
  """
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  nll = -jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
  correct = jnp.argmax(logits, axis=-1) == labels
  if num_valid is None:
    num_valid = jnp.sum(valid)
  # 0, not NaN, if there are none.
  mean = lambda x: jnp.sum(x * valid) / jnp.maximum(num_valid, 1)
  return mean(nll), mean(correct)


class LMLoss(NamedTuple):
  """Cross-entropy of predicted tokens.

  Attributes:
    smoothed: with label smoothing.
    nll: without it, for metrics; no gradient flows through it.
  """

  smoothed: Float[Array, ""]
  nll: Float[Array, ""]


def lm_loss(
  predicted: predictions.Predictions,
  labels: Int[Array, "B L"],
  label_smoothing: float,
  groups: int = 1,
  num_tokens: Int[Array, " G"] | None = None,
) -> LMLoss:
  """Mean cross-entropy of tokens.

  The mean is taken over the tokens of each group, then over groups, because a
  rank of the original divides by its own number of tokens.

  Args:
    predicted: next tokens.
    labels: the input tokens themselves, or IGNORE for tokens that are not
      predicted. The shift by one position happens in this file and nowhere
      else.
    label_smoothing: weight of the uniform distribution.
    groups: number of groups; see `grouped`.
    num_tokens: of the batch of which this one is a part, from `count_tokens`;
      by default its own.
  """
  if num_tokens is None:
    num_tokens = count_tokens(labels, groups)
  kept = grouped(labels[:, 1:] != IGNORE, groups)
  weights = kept / (jnp.maximum(num_tokens, 1) * groups)[:, None, None]
  weights = weights.reshape(len(labels), -1)
  return weighted_lm_loss(predicted, labels, weights, label_smoothing)


def count_tokens(labels: Int[Array, "B L"], groups: int) -> Int[Array, " G"]:
  """Counts the tokens of each group that are predicted; see `lm_loss`."""
  return jnp.sum(grouped(labels[:, 1:] != IGNORE, groups), axis=(1, 2))


def weighted_lm_loss(
  predicted: predictions.Predictions,
  labels: Int[Array, "B L"],
  weights: Float[Array, "B T"],
  label_smoothing: float,
) -> LMLoss:
  """Weighted sum of the cross-entropies of tokens.

  Logits of all positions, in float32, would be the largest array of a step.
  Those of a few positions exist at a time; only their gradient is kept, in the
  dtype of the features.

  Args:
    predicted: next tokens.
    labels: as for `lm_loss`.
    weights: of all tokens but the first one (T = L - 1), 0 where the label is
      IGNORE. No gradient flows through them.
    label_smoothing: as for `lm_loss`.
  """
  sums: Any = _lm_sums(label_smoothing, predicted, labels[:, 1:], weights)
  return LMLoss(sums[0], jax.lax.stop_gradient(sums[1]))


def token_losses(
  logits: Float[Array, "*B V"], labels: Int[Array, "*B"]
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
  """Cross-entropy with each label, and with the uniform distribution."""
  label = jnp.maximum(labels, 0)[..., None]
  # Both terms use logsumexp; log_softmax would be another array as wide as the
  # vocabulary.
  total = jax.nn.logsumexp(logits, axis=-1)
  nll = total - jnp.take_along_axis(logits, label, axis=-1)[..., 0]
  return nll, total - jnp.mean(logits, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lm_sums(label_smoothing, predicted, labels, weights):
  """What `LMLoss` contains, as a pair."""
  return _lm_sums_fwd(label_smoothing, predicted, labels, weights)[0]


def _lm_sums_fwd(label_smoothing, predicted, labels, weights):
  vocab_size = len(predicted.bias)
  target = lambda label: (
    label_smoothing / vocab_size
    + ((1 - label_smoothing) * jax.nn.one_hot(label, vocab_size))
  )

  def chunk(features, labels, weights):
    logits = predicted._replace(features=features).logits()
    nll, uniform = token_losses(logits, labels)
    smoothed = (1 - label_smoothing) * nll + label_smoothing * uniform
    sums = [jnp.sum(weights * x) for x in (smoothed, nll)]
    gradient = jax.nn.softmax(logits, axis=-1) - target(labels)
    gradient = (weights[..., None] * gradient).astype(features.dtype)
    widths = ((0, 0), (0, 0), (0, len(predicted.matrix) - vocab_size))
    return sums, jnp.pad(gradient, widths)

  inputs = predicted.features[:, :-1], labels, weights
  chunks = [_split_positions(x) for x in inputs]
  sums, gradient = jax.lax.map(lambda chunks: chunk(*chunks), chunks)
  return [jnp.sum(x) for x in sums], (predicted, gradient)


def _lm_sums_bwd(label_smoothing, residuals, cotangents):
  del label_smoothing
  (features, matrix, bias), gradient = residuals
  scaled = lambda x, like: (cotangents[0] * x).astype(like.dtype)
  by_feature = jnp.einsum("nbtw,wd->nbtd", gradient, matrix)
  by_feature = _join_positions(by_feature, features.shape[1] - 1)
  # The last position predicts nothing.
  by_feature = jnp.pad(by_feature, ((0, 0), (0, 1), (0, 0)))
  chunks = _split_positions(features[:, :-1])
  by_matrix = jnp.einsum("nbtw,nbtd->wd", gradient, chunks)
  by_bias = jnp.sum(gradient, axis=(0, 1, 2), dtype=bias.dtype)[: len(bias)]
  by_predicted = predictions.Predictions(
    scaled(by_feature, features),
    scaled(by_matrix, matrix),
    scaled(by_bias, bias),
  )
  return by_predicted, None, None


_lm_sums.defvjp(_lm_sums_fwd, _lm_sums_bwd)


def _split_positions(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "n B t ..."]:
  """Splits the positions into n chunks of at most 8, and zeros at the end."""
  length = x.shape[1]
  num_chunks = max(1, -(-length // 8))
  missing = -length % num_chunks
  x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))
  x = x.reshape(len(x), num_chunks, -1, *x.shape[2:])
  return jnp.swapaxes(x, 0, 1)


def _join_positions(
  x: Shaped[Array, "n B t ..."], length: int
) -> Shaped[Array, "B T ..."]:
  """The inverse of `_split_positions`."""
  x = jnp.swapaxes(x, 0, 1)
  return x.reshape(len(x), -1, *x.shape[3:])[:, :length]
