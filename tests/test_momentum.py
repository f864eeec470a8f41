"""Queues and the weight of soft targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.tasks import momentum as momentum_lib


@pytest.mark.parametrize("batch_size", [1, 3, 5, 7, 12])
def test_queue_wraps_at_any_batch_size(batch_size):
  """A ring buffer of 5 holds the last 5 features, oldest overwritten first."""
  queue = jnp.zeros((5, 1))
  momentum = momentum_lib.Momentum({}, queue, queue, jnp.int32(0))
  expected = np.zeros(5)
  for start in range(0, 4 * batch_size, batch_size):
    feat = jnp.arange(start, start + batch_size, dtype=jnp.float32)[:, None]
    momentum = momentum_lib.enqueue(momentum, feat, -feat)
    for value in range(start, start + batch_size):
      expected[value % 5] = value
    np.testing.assert_array_equal(momentum.image_queue[:, 0], expected)
    np.testing.assert_array_equal(momentum.text_queue[:, 0], -expected)
    assert momentum.queue_ptr == (start + batch_size) % 5


def test_alpha_increases_linearly_and_stays():
  steps = jnp.array([0, 50, 100, 500])
  ramped = jax.vmap(lambda s: momentum_lib.ramp(0.4, s, 100))(steps)
  np.testing.assert_allclose(ramped, [0, 0.2, 0.4, 0.4], rtol=1e-6)
