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

from blip_jax.models import blip, config, tying
from blip_jax.tasks import momentum as momentum_lib
from blip_jax.tasks import pretrain
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


@functools.partial(jax.jit, static_argnames=("groups",))
def loss_and_grads(params, momentum, batch, negatives, alpha=0.4, groups=1):
  """One step with recorded negatives: ((loss, (momentum, metrics)), grads)."""
  recorded = iter(negatives)
  task = make_task(
    groups=groups,
    # The original samples an image for each text first, then a text for each
    # image.
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
  params = tying.drop_tied(helpers.params("blip_pretrain"))
  state = helpers.state_dict("blip_pretrain")
  momentum = momentum_lib.Momentum(
    params_m=helpers.momentum_params("blip_pretrain"),
    image_queue=jax.device_put(state["image_queue"].T),
    text_queue=jax.device_put(state["text_queue"].T),
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
  negatives = [
    golden[f"step{step}.neg_{kind}_idx"] for kind in ("image", "text")
  ]
  alpha = golden["alpha"][step]
  return loss_and_grads(
    params, momentum, make_batch(golden, step), negatives, alpha
  )


def losses_of(metrics):
  return np.array([metrics[name] for name in LOSSES])


def negative_weights(golden, **fields):
  """Those by which a step samples images for texts, then texts for images."""

  @jax.jit
  def step(params, momentum, batch):
    weights = []

    def record(key, w):
      weights.append(w)
      return jnp.zeros(w.shape[:2], jnp.int32)

    make_task(sample=record, **fields).loss(
      params, momentum, batch, rng=jax.random.key(0), step=jnp.int32(0)
    )
    return weights

  return jax.device_get(step(*start_state(), make_batch(golden, 0)))


def test_negative_weights(golden):
  weights = negative_weights(golden)
  # CPUs differ in the order of sums.
  compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  compare(weights[0][0], golden["step0.weights_t2i"])
  compare(weights[1][0], golden["step0.weights_i2t"])


def test_negatives_of_smaller_groups_have_the_weights_of_their_group(golden):
  weights = negative_weights(golden, negative_group=2)
  for found, name in zip(weights, ("t2i", "i2t"), strict=True):
    whole = np.asarray(golden[f"step0.weights_{name}"])
    for example in range(len(whole)):
      # Softmax of the batch, without the constant.
      p = np.where(whole[example] > 0, whole[example] - 1e-4, 0)
      p[example] = 1 - p.sum()
      other = example ^ 1
      expected = p[other] / (p[other] + p[example]) + 1e-4
      row = found[example // 2, example % 2]
      np.testing.assert_allclose(row[other % 2], expected, rtol=1e-4)
      assert row[example % 2] == 0


@pytest.mark.parametrize("size", [1, 3, 8])
def test_groups_of_negatives_divide_those_of_itc(golden, size):
  params, momentum = start_state()
  loss = functools.partial(
    make_task(negative_group=size).loss,
    params,
    momentum,
    make_batch(golden, 0),
    rng=jax.random.key(0),
    step=jnp.int32(0),
  )
  with pytest.raises(ValueError, match=r"negative_group: .* found"):
    jax.eval_shape(loss)
  # An evaluation has batches of its own size.
  jax.eval_shape(functools.partial(loss, train=False))


@pytest.mark.parametrize("temp, clamped", [(0.9, 0.5), (0.0001, 0.001)])
def test_temp_is_clamped_before_the_gradient(golden, temp, clamped):
  params, momentum = start_state()
  params = {**params, "temp": jnp.float32(temp)}
  (_, (_, metrics)), grads = golden_step(golden, 0, params, momentum)
  expected = golden[f"clamp{temp}.losses"]
  np.testing.assert_allclose(losses_of(metrics), expected, rtol=1e-4)
  np.testing.assert_allclose(metrics["temp"], clamped)
  assert grads["temp"] != 0


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_group_of_one_example_is_refused(golden, groups):
  params, momentum = start_state()
  first = lambda x: np.asarray(x)[:groups]
  batch = jax.tree.map(first, make_batch(golden, 0))
  negatives = [np.zeros(groups, np.int32)] * 2
  with pytest.raises(ValueError, match=r"batch_size: .* negative"):
    loss_and_grads(params, momentum, batch, negatives, groups=groups)


# Table 3 of the paper rounds the first to 252M.
TRAINABLE = {"tiny": 5_361_727, "base": 252_441_919, "large": 474_729_023}


@pytest.mark.parametrize("name", config.VARIANTS)
def test_exact_parameter_counts(name):
  """Every variant must have a number here."""
  cfg = config.variant(
    name,
    image_size=224,
    vocab_size=30524,
    tokens=config.SpecialTokens(),
  )
  task = dataclasses.replace(make_task(), model=blip.Blip(cfg))
  params = jax.eval_shape(task.init, jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(params)) == TRAINABLE[name]
