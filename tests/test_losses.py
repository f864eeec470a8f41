"""Losses and negatives, as functions of arrays."""

import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.tasks import losses


def test_sampled_negatives_are_never_the_positive():
  weights = losses.hard_negative_weights(
    jnp.stack([jnp.eye(4) * 50, -jnp.eye(4) * 50]),
    same=jnp.eye(4, dtype=bool)[None],
    constant=1e-4,
  )
  keys = jax.random.split(jax.random.key(0), 200)
  sampled = jax.vmap(lambda key: losses.sample_negatives(key, weights))(keys)
  assert (sampled != jnp.arange(4)[None, None]).all()
  # With almost equal weights, every other example is sampled.
  assert len(np.unique(sampled[:, 1, 0])) == 3


def test_negatives_are_sampled_in_proportion_to_their_weights():
  weights = jnp.array([[[0.0, 3.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]])
  keys = jax.random.split(jax.random.key(0), 4000)
  sampled = jax.vmap(lambda key: losses.sample_negatives(key, weights))(keys)
  np.testing.assert_allclose((sampled[:, 0, 0] == 1).mean(), 0.75, atol=0.03)


def test_pairs_without_negative_are_masked():
  """A masked pair contributes to neither loss nor gradient; nothing is NaN."""
  logits = jnp.array([[0.0, 2.0], [1.0, 0.0], [9.0, -9.0]])
  labels = jnp.array([1, 0, 0])
  valid = jnp.array([True, True, False])
  loss = lambda logits: losses.classification_loss(logits, labels, valid)[0]
  value, grad = jax.value_and_grad(loss)(logits)
  by_hand = np.mean([np.log1p(np.exp(-2.0)), np.log1p(np.exp(-1.0))])
  np.testing.assert_allclose(value, by_hand, rtol=1e-6)
  np.testing.assert_array_equal(grad[2], 0)
  none_valid = losses.classification_loss(logits, labels, jnp.zeros(3, bool))
  assert none_valid[0] == 0


def test_texts_without_tokens_have_zero_loss_and_no_nan():
  logits = jnp.ones((2, 3, 5))
  labels = jnp.full((2, 3), losses.IGNORE)
  value, grad = jax.value_and_grad(losses.lm_loss)(logits, labels, 0.1)
  assert value == 0 and (grad == 0).all()
