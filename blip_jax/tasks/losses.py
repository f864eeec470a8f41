"""The losses of all tasks, as functions of arrays (paper, 3.2).

Dimensions: B batch, G groups of b rows each (B = G * b; see `grouped`), K
candidates, L text length, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

IGNORE = -100


def grouped(x: Shaped[Array, "B ..."], groups: int) -> Shaped[Array, "G b ..."]:
  """Views a batch as groups whose rows may be each other's negatives.

  One group is the whole batch.  As many groups as data shards is the original's
  distributed training, where a rank never sees another's current batch.
  """
  return x.reshape(groups, x.shape[0] // groups, *x.shape[1:])


def itc_loss(
  sim: Float[Array, "B K"], targets: Float[Array, "B K"]
) -> Float[Array, ""]:
  """Cross-entropy of similarities (already over `temp`) with soft targets."""
  return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(sim, axis=-1), axis=-1))


def hard_negative_weights(
  sim: Float[Array, "G b b"], same: Bool[Array, "#G b b"], constant: float
) -> Float[Array, "G b b"]:
  """How likely each row of a group is to be another's negative.

  `same` marks positives, which never are; `constant` is added to the others.
  Nothing is learned through a draw.
  """
  sim = jax.lax.stop_gradient(sim)
  return jnp.where(same, 0.0, jax.nn.softmax(sim, axis=-1) + constant)


def sample_negatives(
  key: PRNGKeyArray, weights: Float[Array, "G b b"]
) -> Int[Array, "G b"]:
  """One column a row, with probability in proportion to its weight."""
  return jax.random.categorical(key, jnp.log(weights), axis=-1)


def take_in_group(
  x: Shaped[Array, "B ..."], index: Int[Array, "G b"]
) -> Shaped[Array, "B ..."]:
  """Rows of `x` [B, ...] by their index in their own group.

  Written so that groups which are data shards need no communication: a plain
  `x[index]` would gather the whole batch everywhere.
  """
  rows = jax.vmap(lambda rows, i: rows[i])(grouped(x, index.shape[0]), index)
  return rows.reshape(x.shape)


def classification_loss(
  logits: Float[Array, "n 2"],
  labels: Int[Array, " n"],
  valid: Bool[Array, " n"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Mean cross-entropy of the valid rows, and their accuracy."""
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
  """Smoothed cross-entropy, averaged over the tokens of each group, then over
  groups: a rank of the original divides by its own number of tokens.

  `labels` are the input's own tokens, IGNORE where nothing is to be predicted;
  the shift by one happens here and nowhere else.
  """
  losses, kept = _token_losses(logits, labels, label_smoothing)
  mean = jax.vmap(_mean)(grouped(losses, groups), grouped(kept, groups))
  return jnp.mean(mean)


def lm_loss_per_text(
  logits: Float[Array, "B L V"],
  labels: Int[Array, "B L"],
  label_smoothing: float,
) -> Float[Array, " B"]:
  """Smoothed cross-entropy, summed over each text (not divided by length)."""
  losses, kept = _token_losses(logits, labels, label_smoothing)
  return jnp.sum(losses * kept, axis=-1)


def _token_losses(logits, labels, label_smoothing):
  logits, labels = logits[:, :-1], labels[:, 1:]
  kept = labels != IGNORE
  label = jnp.where(kept, labels, 0)[..., None]
  # logsumexp once, instead of a second array of the vocabulary's width.
  total = jax.nn.logsumexp(logits, axis=-1)
  nll = total - jnp.take_along_axis(logits, label, axis=-1)[..., 0]
  uniform = total - jnp.mean(logits, axis=-1)
  return (1 - label_smoothing) * nll + label_smoothing * uniform, kept


def _mean(x: Array, kept: Array) -> Float[Array, ""]:
  """Mean of the kept entries; 0, not NaN, where none is kept."""
  return jnp.sum(x * kept) / jnp.maximum(jnp.sum(kept), 1)
