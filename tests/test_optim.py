"""Schedules against the original's numbers; AdamW against PyTorch's."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blip_jax.runtime import optim


def config(**changes):
  values = dict(
    schedule="step",
    lr=3e-4,
    min_lr=1e-6,
    warmup_lr=1e-6,
    warmup_steps=3000,
    decay_rate=0.9,
    steps_per_epoch=5000,
    betas=(0.9, 0.999),
    weight_decay=0.05,
    clip=0.0,
    moment_dtype="float32",
  )
  return types.SimpleNamespace(**{**values, **changes})


@pytest.fixture(scope="module")
def golden(golden_dir):
  return np.load(golden_dir / "data" / "lr_schedules.npz")


def test_formulas_equal_the_original_in_float64(golden):
  steps = [
    optim.step_lr(epoch, lr=3e-4, min_lr=1e-6, decay_rate=0.9)
    for epoch in range(0, 70, 5)
  ]
  np.testing.assert_allclose(steps, golden["step__f64"], rtol=1e-9)
  cosines = [
    optim.cosine_lr(epoch, lr=1e-5, min_lr=0.0, epochs=6) for epoch in range(7)
  ]
  np.testing.assert_allclose(
    cosines, golden["cosine__f64"], rtol=1e-9, atol=1e-20
  )
  warm = [
    optim.warmup_lr(step, lr=3e-4, warmup_lr=1e-6, warmup_steps=3000)
    for step in (0, 1, 100, 1500, 2999, 3000, 5000)
  ]
  np.testing.assert_allclose(warm, golden["warmup__f64"], rtol=1e-9)


def test_compiled_schedules_equal_the_original_to_float32(golden):
  # float32 has a relative spacing of 1.2e-7; warm-up takes three roundings.
  rate = jax.jit(optim.schedule(config(), 70 * 5000))
  epochs = [rate(jnp.int32(epoch * 5000)) for epoch in range(5, 70, 5)]
  np.testing.assert_allclose(epochs, golden["step__f64"][1:], rtol=6e-8)
  warm = [rate(jnp.int32(s)) for s in (0, 1, 100, 1500, 2999, 3000, 4999)]
  np.testing.assert_allclose(warm, golden["warmup__f64"], rtol=2e-7)
  rate = jax.jit(
    optim.schedule(
      config(schedule="cosine_epoch", lr=1e-5, min_lr=0.0, steps_per_epoch=10),
      60,
    )
  )
  cosines = [rate(jnp.int32(10 * epoch + 9)) for epoch in range(6)]
  np.testing.assert_allclose(cosines, golden["cosine__f64"][:6], rtol=6e-8)


def test_warmup_is_cut_by_the_end_of_epoch_0_and_the_rate_jumps():
  rate = optim.schedule(config(steps_per_epoch=1000), 20_000)
  np.testing.assert_allclose(rate(999), 1e-6 + 2.99e-4 * 999 / 3000, rtol=3e-7)
  np.testing.assert_allclose(rate(1000), 3e-4 * 0.9, rtol=1e-7)
  # Constant within an epoch.
  assert rate(1000) == rate(1999)


@pytest.mark.parametrize(
  ("lr", "decay_rate", "epoch_19"),
  [
    (3e-4, 0.9, 4.0525515e-05),  # repository YAML
    (3e-4, 0.85, 1.3679835e-05),  # paper, base
    (2e-4, 0.85, 9.1198897e-06),  # paper, large
  ],
)
def test_named_recipes(lr, decay_rate, epoch_19):
  rate = optim.schedule(config(lr=lr, decay_rate=decay_rate), 20 * 5000)
  np.testing.assert_allclose(rate(0), 1e-6, rtol=1e-6)
  np.testing.assert_allclose(rate(3000), lr, rtol=1e-7)
  np.testing.assert_allclose(rate(99_999), epoch_19, rtol=1e-6)


def test_smooth_cosine_reaches_its_floor():
  rate = optim.schedule(
    config(schedule="cosine", lr=1e-3, min_lr=2e-5, warmup_steps=100), 1000
  )
  np.testing.assert_allclose(
    [rate(0), rate(50), rate(100), rate(550), rate(1000), rate(2000)],
    [1e-6, 5.005e-4, 1e-3, 5.1e-4, 2e-5, 2e-5],
    rtol=1e-5,
  )


@pytest.mark.parametrize(
  ("changes", "key"),
  [
    (dict(schedule="linear"), "config.optim.schedule"),
    (dict(steps_per_epoch=0), "config.optim.steps_per_epoch"),
    (dict(schedule="cosine", warmup_steps=100), "config.optim.warmup_steps"),
  ],
)
def test_impossible_schedules_name_their_key(changes, key):
  with pytest.raises(ValueError, match=key):
    optim.schedule(config(**changes), 100)


def test_decay_touches_biases_and_temp():
  tx, _ = optim.make(config(schedule="cosine", warmup_steps=0, lr=0.5), 10)
  params = {"bias": np.full(2, 4.0), "temp": np.float32(2.0)}
  grads = jax.tree.map(np.zeros_like, params)
  updates, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
  # No gradient: all that is left is lr * weight_decay * p.
  np.testing.assert_allclose(updates["bias"], -0.5 * 0.05 * 4.0, rtol=1e-6)
  np.testing.assert_allclose(updates["temp"], -0.5 * 0.05 * 2.0, rtol=1e-6)


def test_clipping_bounds_the_global_norm_and_keeps_the_structure():
  params = {"a": np.zeros(3), "b": np.zeros(4)}
  grads = {"a": np.full(3, 30.0), "b": np.full(4, -40.0)}
  free, _ = optim.make(config(), 10_000)
  clipped, _ = optim.make(config(clip=1.0), 10_000)
  tree = jax.tree.structure
  start = jax.jit(clipped.init)(params)
  assert tree(jax.eval_shape(free.init, params)) == tree(start)
  _, state = jax.jit(clipped.update)(grads, start, params)
  # The first moment is (1 - beta1) times the gradient that Adam was given.
  mu = optax.tree_utils.tree_get(state, "mu")
  norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in mu.values()))
  np.testing.assert_allclose(norm, 0.1, rtol=1e-6)


def test_the_first_moment_in_bfloat16_is_the_plain_one_rounded():
  """A thousand steps of noisy gradients end near the same parameters."""
  params = {"a": jnp.zeros(50)}
  goal = jax.random.normal(jax.random.key(0), (50,))

  @functools.partial(jax.jit, static_argnames="dtype")
  def train(dtype):
    tx, _ = optim.make(
      config(lr=1e-2, warmup_steps=0, moment_dtype=dtype), 1000
    )

    def step(carry, key):
      params, state = carry
      noise = 0.3 * jax.random.normal(key, (50,))
      grads = {"a": params["a"] - goal + noise}
      updates, state = tx.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), 1000)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[0]

  (plain, state), (rounded, rounded_state) = train("float32"), train("bfloat16")
  get = optax.tree_utils.tree_get
  assert get(rounded_state, "mu")["a"].dtype == jnp.bfloat16
  assert get(rounded_state, "nu")["a"].dtype == jnp.float32
  np.testing.assert_allclose(
    get(rounded_state, "nu")["a"], get(state, "nu")["a"], rtol=2e-2
  )
  assert np.abs(plain["a"] - goal).max() < 0.2
  np.testing.assert_allclose(rounded["a"], plain["a"], atol=5e-3)


def test_other_dtypes_of_moments_are_refused():
  with pytest.raises(ValueError, match=r"moment_dtype .* found 'float16'"):
    optim.make(config(moment_dtype="float16"), 10_000)


@pytest.mark.parity
def test_adamw_equals_torch():
  torch = pytest.importorskip("torch", reason="needs the extra [parity]")

  rng = np.random.default_rng(0)
  start = {
    "kernel": rng.normal(size=(5, 7)).astype(np.float32),
    "bias": rng.normal(size=(7,)).astype(np.float32),
    "temp": np.float32(0.07),
  }
  conf = config(lr=1e-2, warmup_lr=1e-3, warmup_steps=4, steps_per_epoch=6)
  tx, rate = optim.make(conf, 12)
  update, rate = jax.jit(tx.update), jax.jit(rate)
  params = jax.device_put(start)
  state = tx.init(params)
  parameters = {
    k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()
  }
  theirs = torch.optim.AdamW(
    parameters.values(), lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05
  )
  moved = 0.0
  for step in range(12):
    grads = {
      k: np.float32(rng.normal(size=v.shape) * 10.0 ** -rng.integers(0, 5))
      for k, v in start.items()
    }
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    for group in theirs.param_groups:
      group["lr"] = float(rate(step))
    for k, parameter in parameters.items():
      parameter.grad = torch.tensor(grads[k])
    theirs.step()
    moved += float(rate(step))
    for k, parameter in parameters.items():
      # Bias corrections are float32 here and float64 there, which is 1e-5 of
      # an update in the first steps and less later.
      np.testing.assert_allclose(
        params[k], parameter.detach().numpy(), rtol=5e-7, atol=1e-5 * moved
      )


@pytest.mark.parametrize(
  "epoch, rate",
  [
    # Halfway between 1e-3 and 2e-4, and a quarter of the way: cos(45 degrees).
    (0, 1e-3),
    (1, 6e-4 + 4e-4 * 0.5**0.5),
    (2, 6e-4),
    (3, 6e-4 - 4e-4 * 0.5**0.5),
    (4, 2e-4),
  ],
)
def test_a_cosine_of_epochs_falls_to_its_floor(epoch, rate):
  assert optim.cosine_lr(epoch, lr=1e-3, min_lr=2e-4, epochs=4) == (
    pytest.approx(rate, rel=1e-12)
  )
  schedule = optim.schedule(
    config(schedule="cosine_epoch", lr=1e-3, min_lr=2e-4, steps_per_epoch=5),
    20,
  )
  # The first and the last step of the epoch; nothing follows the floor.
  steps = (5 * epoch, 5 * epoch + 4, 10_000) if epoch == 4 else (5 * epoch,)
  np.testing.assert_allclose([schedule(s) for s in steps], rate, rtol=1e-7)


def test_an_incomplete_last_epoch_counts_as_an_epoch():
  """11 steps of 5 are three epochs: the second keeps 3/4, the third 1/4."""
  rate = optim.schedule(
    config(schedule="cosine_epoch", lr=1.0, min_lr=0.0, steps_per_epoch=5), 11
  )
  np.testing.assert_allclose(
    [rate(4), rate(5), rate(9), rate(10), rate(14)],
    [1.0, 0.75, 0.75, 0.25, 0.25],
    rtol=1e-6,
  )


def test_the_step_schedule_ends_at_its_floor():
  assert optim.step_lr(2, lr=1.0, min_lr=0.3, decay_rate=0.5) == 0.3
  assert optim.step_lr(1, lr=1.0, min_lr=0.3, decay_rate=0.5) == 0.5
  conf = config(
    lr=1.0, min_lr=0.3, decay_rate=0.5, warmup_steps=0, steps_per_epoch=3
  )
  rate = optim.schedule(conf, 9)
  np.testing.assert_allclose(
    [rate(s) for s in (1, 2, 3, 5, 6, 8, 9, 1000)],
    [1, 1, 0.5, 0.5, 0.3, 0.3, 0.3, 0.3],
    rtol=1e-6,
  )


@pytest.mark.parametrize(
  "step, warmup_steps, rate",
  [
    (0, 0, 0.1),
    (1, 0, 1.0),
    (0, 1, 0.1),
    (1, 1, 1.0),
    (1, 4, 0.325),
    (4, 4, 1.0),
    (5, 4, 1.0),
  ],
)
def test_warm_up_reaches_its_end_at_its_last_step(step, warmup_steps, rate):
  """Without warm-up the first step still has the starting rate, as in the
  original."""
  assert optim.warmup_lr(
    step, lr=1.0, warmup_lr=0.1, warmup_steps=warmup_steps
  ) == pytest.approx(rate)
  conf = config(
    lr=1.0, warmup_lr=0.1, warmup_steps=warmup_steps, steps_per_epoch=100
  )
  np.testing.assert_allclose(optim.schedule(conf, 100)(step), rate, rtol=1e-6)


def test_one_step_per_epoch_and_a_warm_up_of_all_but_one_step():
  rate = optim.schedule(
    config(
      steps_per_epoch=1, lr=1.0, decay_rate=0.5, warmup_lr=0.0, min_lr=0.0
    ),
    3,
  )
  np.testing.assert_allclose([rate(0), rate(1), rate(2)], [0, 0.5, 0.25])
  rate = optim.schedule(
    config(schedule="cosine", lr=1.0, warmup_lr=0.0, warmup_steps=3), 4
  )
  np.testing.assert_allclose([rate(1), rate(3)], [1 / 3, 1], rtol=1e-6)


def test_the_first_update_of_adamw_by_hand():
  """Bias-corrected moments are g and g * g: the step is g / (|g| + 1e-8)."""
  conf = config(schedule="cosine", warmup_steps=0, lr=0.5, weight_decay=0.25)
  tx, _ = optim.make(conf, 10)
  params = {"a": np.array([2.0, 2.0, 2.0])}
  grads = {"a": np.array([3.0, -1e-3, 1e-8])}
  start = jax.jit(tx.init)(params)
  updates, state = jax.jit(tx.update)(grads, start, params)
  expected = -0.5 * (np.array([1, -1, 0.5]) + 0.25 * 2.0)
  np.testing.assert_allclose(updates["a"], expected, rtol=1e-4)
  mu, nu = (optax.tree_utils.tree_get(state, n) for n in ("mu", "nu"))
  np.testing.assert_allclose(mu["a"], 0.1 * grads["a"], rtol=1e-5)
  np.testing.assert_allclose(nu["a"], 0.001 * grads["a"] ** 2, rtol=1e-5)
