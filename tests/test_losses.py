"""Losses and negatives, as functions of arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.models import predictions
from blip_jax.tasks import losses
from tests import helpers


def predicted(logits):
  """Predictions with these logits."""
  matrix = jnp.eye(logits.shape[-1])
  return predictions.Predictions(logits, matrix, jnp.zeros(len(matrix)))


# Without `jax.jit`, every operation would be compiled as a program of its own.
@functools.partial(jax.jit, static_argnames=("label_smoothing", "groups"))
def lm_loss(logits, labels, label_smoothing, groups=1):
  return losses.lm_loss(
    predicted(logits), labels, label_smoothing, groups
  ).smoothed


def test_similarities_within_groups():
  sim = np.arange(72.0, dtype=np.float32).reshape(2, 6, 6)
  found = losses.within_groups(jnp.asarray(sim), 2)
  expected = [sim[g, i : i + 2, i : i + 2] for g in (0, 1) for i in (0, 2, 4)]
  np.testing.assert_array_equal(found, expected)


def sample_often(weights, times):
  """Samples negatives with as many keys: [times, G, b]."""
  keys = jax.random.split(jax.random.key(0), times)
  sample = jax.vmap(losses.sample_negatives, in_axes=(0, None))
  return np.asarray(jax.jit(sample)(keys, weights))


def test_sampled_negatives_are_never_the_positive():
  sim = 50 * np.eye(4, dtype=np.float32)
  weights = losses.hard_negative_weights(
    jnp.array([sim, -sim]),
    same=jnp.array([np.eye(4, dtype=bool)]),
    constant=1e-4,
  )
  sampled = sample_often(weights, 200)
  assert (sampled != np.arange(4)).all()
  # With almost equal weights, every other example is sampled.
  assert len(np.unique(sampled[:, 1, 0])) == 3


def test_negatives_are_sampled_in_proportion_to_their_weights():
  weights = jnp.array([[[0.0, 3.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]])
  sampled = sample_often(weights, 4000)
  np.testing.assert_allclose((sampled[:, 0, 0] == 1).mean(), 0.75, atol=0.03)


def test_pairs_without_negative_are_masked():
  """A masked pair contributes to neither loss nor gradient; nothing is NaN."""
  logits = jnp.array([[0.0, 2.0], [1.0, 0.0], [9.0, -9.0]])
  labels = jnp.array([1, 0, 0])
  valid = jnp.array([True, True, False])
  loss = lambda logits, valid: losses.classification_loss(
    logits, labels, valid
  )[0]
  loss_and_grad = jax.jit(jax.value_and_grad(loss))
  value, grad = loss_and_grad(logits, valid)
  by_hand = np.mean([np.log1p(np.exp(-2.0)), np.log1p(np.exp(-1.0))])
  np.testing.assert_allclose(value, by_hand, rtol=1e-6)
  np.testing.assert_array_equal(np.asarray(grad)[2], 0)
  none_valid, _ = loss_and_grad(logits, np.zeros(3, bool))
  assert none_valid == 0


def test_texts_without_tokens_have_zero_loss_and_no_nan():
  logits = np.ones((2, 3, 5), np.float32)
  labels = np.full((2, 3), losses.IGNORE)
  value, grad = jax.value_and_grad(lm_loss)(logits, labels, 0.1)
  assert value == 0 and (np.asarray(grad) == 0).all()


def test_lm_loss_by_hand():
  """Smoothing 0.1 over four words: the label gets 0.925, the others 0.025."""
  logits = np.array(
    [[[2.0, 0.0, -1.0, 0.5], [0.0, 1.0, 0.0, 0.0], [9.0] * 4]], np.float32
  )
  labels = np.array([[3, 0, 1]])  # the first token is never predicted
  log_p = np.asarray(jax.nn.log_softmax(logits[0, :2]))
  target = np.full((2, 4), 0.025)
  target[0, 0] = target[1, 1] = 0.925
  by_token = -(target * log_p).sum(axis=1)
  loss = lm_loss(logits, labels, 0.1)
  np.testing.assert_allclose(loss, by_token.mean(), rtol=1e-6)
  np.testing.assert_allclose(
    helpers.lm_loss_per_text(logits, labels, 0.1), [by_token.sum()], rtol=1e-6
  )
  plain = lm_loss(logits, labels, 0.0)
  np.testing.assert_allclose(plain, -(log_p[0, 0] + log_p[1, 1]) / 2, rtol=1e-6)


def test_groups_of_lm_have_equal_weight_however_long_their_texts_are():
  logits = jnp.array([[[0.0, 3.0]] * 4, [[3.0, 0.0]] * 4])
  labels = jnp.array([[1, 1, 1, 1], [1, 1, losses.IGNORE, losses.IGNORE]])
  low, high = np.log1p(np.exp(-3.0)), np.log1p(np.exp(3.0))
  together = lm_loss(logits, labels, 0.0)
  np.testing.assert_allclose(together, (3 * low + high) / 4, rtol=1e-6)
  apart = lm_loss(logits, labels, 0.0, groups=2)
  np.testing.assert_allclose(apart, (low + high) / 2, rtol=1e-6)
  np.testing.assert_allclose(
    helpers.lm_loss_per_text(logits, labels, 0.0), [3 * low, high], rtol=1e-6
  )


def test_lm_loss_in_chunks_has_the_gradients_of_all_positions_at_once():
  """However many positions there are; the loss is scaled by 3 afterwards."""
  rng = np.random.default_rng(0)
  array = lambda *shape: rng.normal(size=shape).astype(np.float32)
  matrix, bias = array(7, 5), array(7)

  @jax.jit
  @jax.value_and_grad
  def at_once(predicted, labels):
    log_p = jax.nn.log_softmax(
      predicted.features[:, :-1] @ predicted.matrix.T
      + predicted.bias[None, None]
    )
    label = jax.nn.one_hot(labels[:, 1:], 7)
    by_token = -((0.9 * label + 0.1 / 7) * log_p).sum(axis=-1)
    kept = labels[:, 1:] != losses.IGNORE
    halves = jnp.split(by_token * kept, 2), jnp.split(kept, 2)
    means = [x.sum() / kept.sum() for x, kept in zip(*halves, strict=True)]
    return 3 * jnp.mean(jnp.stack(means))

  @jax.jit
  @jax.value_and_grad
  def in_chunks(predicted, labels):
    return 3 * losses.lm_loss(predicted, labels, 0.1, groups=2).smoothed

  for length in (2, 9, 10, 20):
    features = array(4, length, 5)
    labels = rng.integers(0, 7, (4, length))
    labels[1, 1:] = losses.IGNORE
    arrays = predictions.Predictions(features, matrix, bias)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
      in_chunks(arrays, labels),
      at_once(arrays, labels),
    )


def test_the_loss_of_half_precision_ignores_rows_of_padding():
  rng = np.random.default_rng(0)
  features = rng.normal(size=(2, 4, 8)).astype(jnp.bfloat16)
  embeddings = rng.normal(size=(130, 8)).astype(np.float32)
  labels = rng.integers(0, 130, (2, 4))

  def loss(embeddings, dtype):
    matrix = predictions.output_matrix(embeddings, dtype)
    arrays = predictions.Predictions(
      jnp.asarray(features, dtype), matrix, jnp.zeros(130)
    )
    assert len(matrix) == (256 if dtype == "bfloat16" else 130)
    return losses.lm_loss(arrays, jnp.asarray(labels), 0.1).smoothed

  gradient = jax.jit(jax.value_and_grad(loss), static_argnames="dtype")
  value, half = gradient(embeddings, "bfloat16")
  expected_value, expected = gradient(embeddings, "float32")
  np.testing.assert_allclose(value, expected_value, rtol=1e-2)
  np.testing.assert_allclose(
    half, expected, atol=2e-2 * np.abs(np.asarray(expected)).max()
  )


def test_itc_loss_by_hand():
  sim = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
  targets = jnp.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
  expected = (1.5 * np.log(2) - np.log(0.8)) / 2
  np.testing.assert_allclose(losses.itc_loss(sim, targets), expected, rtol=1e-6)


def test_weights_of_negatives_by_hand():
  """The softmax over the whole row, plus a constant; positives have none."""
  rows = [[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]
  sim, same = jnp.log(jnp.array([rows])), jnp.eye(3, dtype=bool)[None]
  weights = losses.hard_negative_weights(sim, same, constant=0.01)
  np.testing.assert_allclose(
    weights, [[[0, 0.26, 0.26], [0.11, 0, 0.11], [0.31, 0.31, 0]]], rtol=1e-5
  )
  grad = jax.grad(
    lambda s: losses.hard_negative_weights(s, same, constant=0.0)[0, 0, 1]
  )(sim)
  assert (grad == 0).all()


def test_accuracy_counts_valid_examples_only():
  logits = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [5.0, 0.0]])
  labels = jnp.array([0, 0, 1, 1])
  _, accuracy = losses.classification_loss(
    logits, labels, jnp.array([True, True, True, False])
  )
  np.testing.assert_allclose(accuracy, 2 / 3, rtol=1e-6)


def test_examples_are_taken_from_their_own_group():
  x = jnp.arange(12).reshape(6, 2)
  taken = losses.take_in_group(x, jnp.array([[2, 0, 0], [1, 1, 2]]))
  np.testing.assert_array_equal(taken[:, 0] // 2, [2, 0, 0, 4, 4, 5])
  assert losses.grouped(x, 2).shape == (2, 3, 2)
  assert losses.grouped(x, 1).shape == (1, 6, 2)
