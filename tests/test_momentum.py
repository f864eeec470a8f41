"""Queues and the weight of soft targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.tasks import momentum as momentum_lib


@pytest.mark.parametrize("batch_size", [1, 3, 5, 7, 12])
def test_queue_wraps_at_any_batch_size(batch_size):
  """A ring buffer of 5 holds the last 5 features, oldest overwritten first."""
  queue, enqueue = np.zeros((5, 1)), jax.jit(momentum_lib.enqueue)
  momentum = momentum_lib.Momentum({}, queue, queue, np.int32(0))
  expected = np.zeros(5)
  for start in range(0, 4 * batch_size, batch_size):
    feat = np.arange(start, start + batch_size, dtype=np.float32)[:, None]
    momentum = enqueue(momentum, feat, -feat)
    for value in range(start, start + batch_size):
      expected[value % 5] = value
    images, texts = map(np.asarray, (momentum.image_queue, momentum.text_queue))
    np.testing.assert_array_equal(images[:, 0], expected)
    np.testing.assert_array_equal(texts[:, 0], -expected)
    assert momentum.queue_ptr == (start + batch_size) % 5


def test_alpha_increases_linearly_and_stays():
  steps = jnp.array([0, 50, 100, 500])
  ramped = jax.vmap(lambda s: momentum_lib.ramp(0.4, s, 100))(steps)
  np.testing.assert_allclose(ramped, [0, 0.2, 0.4, 0.4], rtol=1e-6)


def test_alpha_is_complete_at_once_without_a_ramp():
  ramped = [momentum_lib.ramp(0.4, jnp.int32(s), 0) for s in (0, 1, 2)]
  np.testing.assert_allclose(ramped, [0, 0.4, 0.4], rtol=1e-6)


def test_momentum_encoders_move_by_one_minus_the_decay():
  parts = momentum_lib.MOMENTUM_PARTS
  assert parts == ("visual_encoder", "vision_proj", "text_encoder", "text_proj")
  params = {name: jnp.float32(2.0) for name in (*parts, "temp", "itm_head")}
  queue = jnp.zeros((1, 1))
  before = momentum_lib.Momentum(
    {name: jnp.float32(1.0) for name in parts}, queue, queue, jnp.int32(0)
  )
  after = momentum_lib.ema(params, before, 0.75)
  assert set(after.params_m) == set(parts)
  np.testing.assert_allclose([*after.params_m.values()], 1.25)


@pytest.mark.parametrize(
  "temp, clamped", [(0.07, 0.07), (0.7, 0.5), (0.5, 0.5), (0.0, 0.001)]
)
def test_the_temperature_stays_between_a_thousandth_and_a_half(temp, clamped):
  params = {"temp": jnp.float32(temp), "bias": jnp.float32(7.0)}
  result = momentum_lib.clamp_temp(params)
  np.testing.assert_allclose(result["temp"], clamped, rtol=1e-6)
  assert result["bias"] == 7


def test_soft_targets_by_hand():
  targets = jax.jit(momentum_lib.soft_targets)(
    np.log([[0.5, 0.3, 0.2]]), np.array([[0.0, 1.0, 0.0]]), 0.4
  )
  np.testing.assert_allclose(targets, [[0.2, 0.72, 0.08]], rtol=1e-6)


def test_momentum_starts_with_copies_and_unit_features():
  params = {name: jnp.ones(2) for name in momentum_lib.MOMENTUM_PARTS}
  init = jax.jit(momentum_lib.init, static_argnums=(1, 2))
  state = init({**params, "temp": jnp.float32(1)}, 5, 8, jax.random.key(0))
  assert state.params_m.keys() == params.keys()
  assert state.image_queue.shape == state.text_queue.shape == (5, 8)
  for queue in (state.image_queue, state.text_queue):
    np.testing.assert_allclose(np.linalg.norm(queue, axis=1), 1, rtol=1e-5)
  assert (state.image_queue != state.text_queue).all()
  assert state.queue_ptr == 0 and state.idx_queue is None
