"""The pre-training step.

tests/parity compares losses, gradients, momentum state and steps of AdamW with
the original, on one process and on two.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.models import blip, config, med
from blip_jax.tasks import losses, pretrain
from blip_jax.tasks import momentum as momentum_lib
from tests import helpers

LOSSES = ("loss_itc", "loss_itm", "loss_lm")


@pytest.fixture(scope="module")
def golden():
  return helpers.arrays("blip_pretrain")


def make_task(**kwargs):
  """The goldens' task.  They give `alpha` per step: step 400 is alpha 0.4."""
  fields = dict(
    queue_size=12, ema_decay=0.995, alpha=1.0, alpha_ramp_steps=1000
  )
  return pretrain.Pretrain(blip.Blip(helpers.BLIP), **{**fields, **kwargs})


@functools.partial(jax.jit, static_argnames=("groups", "num_shards"))
def loss_and_grads(
  params, momentum, batch, drawn, alpha=0.4, groups=1, num_shards=1
):
  """One step with recorded negatives: ((loss, (momentum, metrics)), grads)."""
  recorded = iter(drawn)
  task = make_task(
    groups=groups,
    num_shards=num_shards,
    # The original draws each text's image first, then each image's text.
    sample=lambda key, weights: next(recorded).reshape(weights.shape[:2]),
  )

  def loss(params):
    return task.loss(
      params,
      momentum,
      batch,
      rng=jax.random.key(0),
      step=jnp.int32(jnp.round(1000 * alpha)),
    )

  return jax.value_and_grad(loss, has_aux=True)(task.clamp(params))


def start_state():
  params = med.drop_tied(helpers.params("blip_pretrain"))
  state = helpers.state_dict("blip_pretrain")
  momentum = momentum_lib.Momentum(
    params_m=helpers.momentum_params("blip_pretrain"),
    image_queue=jnp.asarray(state["image_queue"].T),
    text_queue=jnp.asarray(state["text_queue"].T),
    queue_ptr=jnp.int32(state["queue_ptr"][0]),
  )
  return params, momentum


def make_batch(golden, step):
  return {
    "image": helpers.image(golden[f"step{step}.image"]),
    "input_ids": golden[f"step{step}.caption.input_ids"],
    "attention_mask": golden[f"step{step}.caption.attention_mask"],
  }


def golden_step(golden, step, params, momentum):
  drawn = [golden[f"step{step}.neg_{kind}_idx"] for kind in ("image", "text")]
  alpha = golden["alpha"][step]
  return loss_and_grads(
    params, momentum, make_batch(golden, step), drawn, alpha
  )


def losses_of(metrics):
  return np.array([metrics[name] for name in LOSSES])


def test_negative_weights(golden):
  params, momentum = start_state()
  weights = []

  def record(key, w):
    weights.append(w[0])
    return jnp.zeros(w.shape[:2], jnp.int32)

  make_task(sample=record).loss(
    params,
    momentum,
    make_batch(golden, 0),
    rng=jax.random.key(0),
    step=jnp.int32(0),
  )
  np.testing.assert_allclose(weights[0], golden["step0.weights_t2i"], atol=1e-6)
  np.testing.assert_allclose(weights[1], golden["step0.weights_i2t"], atol=1e-6)


@pytest.mark.parametrize("temp, clamped", [(0.9, 0.5), (0.0001, 0.001)])
def test_temp_is_clamped_before_the_gradient(golden, temp, clamped):
  params, momentum = start_state()
  params = {**params, "temp": jnp.float32(temp)}
  (_, (_, metrics)), grads = golden_step(golden, 0, params, momentum)
  expected = golden[f"clamp{temp}.losses"]
  np.testing.assert_allclose(losses_of(metrics), expected, rtol=1e-4)
  np.testing.assert_allclose(metrics["temp"], clamped)
  assert grads["temp"] != 0


def test_tokens_of_other_devices_are_projected_again():
  """Global scope over shards moves tokens instead of keys: same numbers."""
  params, momentum = start_state()
  golden = helpers.arrays("blip_pretrain")
  batch = make_batch(golden, 0)
  drawn = [golden[f"step0.neg_{kind}_idx"] for kind in ("image", "text")]
  one, many = (
    loss_and_grads(params, momentum, batch, drawn, num_shards=n) for n in (1, 4)
  )
  np.testing.assert_allclose(
    losses_of(one[0][1][1]), losses_of(many[0][1][1]), rtol=1e-6
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one[1], many[1]
  )


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_group_of_one_row_is_refused(golden, groups):
  params, momentum = start_state()
  batch = jax.tree.map(lambda x: x[:groups], make_batch(golden, 0))
  drawn = [jnp.zeros(groups, jnp.int32)] * 2
  with pytest.raises(ValueError, match=r"batch_size: .* negative"):
    loss_and_grads(params, momentum, batch, drawn, groups=groups)


def test_draws_never_pick_the_positive():
  weights = losses.hard_negative_weights(
    jnp.stack([jnp.eye(4) * 50, -jnp.eye(4) * 50]),
    same=jnp.eye(4, dtype=bool)[None],
    constant=1e-4,
  )
  keys = jax.random.split(jax.random.key(0), 200)
  drawn = jax.vmap(lambda key: losses.sample_negatives(key, weights))(keys)
  assert (drawn != jnp.arange(4)[None, None]).all()
  # Near-equal weights reach every other row.
  assert len(np.unique(drawn[:, 1, 0])) == 3


def test_draws_follow_the_weights():
  weights = jnp.array([[[0.0, 3.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]])
  keys = jax.random.split(jax.random.key(0), 4000)
  drawn = jax.vmap(lambda key: losses.sample_negatives(key, weights))(keys)
  np.testing.assert_allclose((drawn[:, 0, 0] == 1).mean(), 0.75, atol=0.03)


def test_pairs_without_negative_are_masked():
  """A masked pair moves neither loss nor gradient, and nothing is NaN."""
  logits = jnp.array([[0.0, 2.0], [1.0, 0.0], [9.0, -9.0]])
  labels = jnp.array([1, 0, 0])
  valid = jnp.array([True, True, False])
  loss = lambda logits: losses.classification_loss(logits, labels, valid)[0]
  value, grad = jax.value_and_grad(loss)(logits)
  by_hand = np.mean([np.log1p(np.exp(-2.0)), np.log1p(np.exp(-1.0))])
  np.testing.assert_allclose(value, by_hand, rtol=1e-6)
  np.testing.assert_array_equal(grad[2], 0)
  nothing = losses.classification_loss(logits, labels, jnp.zeros(3, bool))
  assert nothing[0] == 0


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


def test_alpha_ramps_and_stays():
  steps = jnp.array([0, 50, 100, 500])
  ramped = jax.vmap(lambda s: momentum_lib.ramp(0.4, s, 100))(steps)
  np.testing.assert_allclose(ramped, [0, 0.2, 0.4, 0.4], rtol=1e-6)


def test_texts_of_no_tokens_give_zero_loss_and_no_nan():
  logits = jnp.ones((2, 3, 5))
  nothing = jnp.full((2, 3), losses.IGNORE)
  value, grad = jax.value_and_grad(losses.lm_loss)(logits, nothing, 0.1)
  assert value == 0 and (grad == 0).all()


# Table 3 of the paper rounds the first to 252M.
TRAINABLE = {"tiny": 5_361_727, "base": 252_441_919, "large": 474_729_023}


@pytest.mark.parametrize("name", config.VARIANTS)
def test_exact_parameter_counts(name):
  """No variant without a number here."""
  cfg = config.variant(
    name,
    image_size=224,
    vocab_size=30524,
    tokens=config.SpecialTokens(),
  )
  task = dataclasses.replace(make_task(), model=blip.Blip(cfg))
  params = jax.eval_shape(task.init, jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(params)) == TRAINABLE[name]
