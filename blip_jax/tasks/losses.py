"""The losses of all tasks, as functions of arrays (paper, section 3.2).

Dimensions: B batch, G groups of b examples each (B = G * b; see `grouped`), K
candidates, L text length, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

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
  sim: Float[Array, "B K"], targets: Float[Array, "B K"]
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
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Mean cross-entropy of the valid examples, and their accuracy."""
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  nll = -jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0]
  correct = jnp.argmax(logits, axis=-1) == labels
  return _mean(nll, valid), _mean(correct, valid)


def lm_loss(
  logits: Float[Array, "B L V"],
  labels: Int[Array, "B L"],
  label_smoothing: float,
  groups: int = 1,
) -> Float[Array, ""]:
  """Label-smoothed cross-entropy, averaged over tokens.

  The mean is taken over the tokens of each group, then over groups, because a
  rank of the original divides by its own number of tokens.

  Args:
    logits: next-token logits.
    labels: the input tokens themselves, or IGNORE for tokens that are not
      predicted. The shift by one position happens here and nowhere else.
    label_smoothing: weight of the uniform distribution.
    groups: number of groups; see `grouped`.
  """
  losses, kept = _token_losses(logits, labels, label_smoothing)
  mean = jax.vmap(_mean)(grouped(losses, groups), grouped(kept, groups))
  return jnp.mean(mean)


def lm_loss_per_text(
  logits: Float[Array, "B L V"],
  labels: Int[Array, "B L"],
  label_smoothing: float,
) -> Float[Array, " B"]:
  """Label-smoothed cross-entropy, summed over the tokens of each text.

  Arguments as for `lm_loss`.
  """
  losses, kept = _token_losses(logits, labels, label_smoothing)
  return jnp.sum(losses * kept, axis=-1)


def token_losses(
  logits: Float[Array, "*B V"], labels: Int[Array, "*B"]
) -> tuple[Float[Array, "*B"], Float[Array, "*B"]]:
  """Cross-entropy with each label, and with the uniform distribution."""
  # Both terms use logsumexp; log_softmax would be another array as wide as the
  # vocabulary.
  total = jax.nn.logsumexp(logits, axis=-1)
  label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  return total - label, total - jnp.mean(logits, axis=-1)


def _token_losses(logits, labels, label_smoothing):
  logits, labels = logits[:, :-1], labels[:, 1:]
  kept = labels != IGNORE
  nll, uniform = token_losses(logits, jnp.where(kept, labels, 0))
  return (1 - label_smoothing) * nll + label_smoothing * uniform, kept


def _mean(x: Array, kept: Array) -> Float[Array, ""]:
  """Mean of the kept entries; 0, not NaN, if there are none."""
  return jnp.sum(x * kept) / jnp.maximum(jnp.sum(kept), 1)
