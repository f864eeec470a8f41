"""Alarms ring once, when they should, and leave the evidence."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from blip_jax.runtime import alarms


def test_finite_metrics_pass(tmp_path):
  alarms.check_finite(tmp_path, 3, {"train/loss": 1.0}, ["a:0"])
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_loss_stops_with_the_batch(tmp_path, value):
  metrics = {"train/loss_itc": 1.0, "train/loss_lm": jnp.float32(value)}
  ids = ["train.json:17", "scenes/train:5"]
  with pytest.raises(FloatingPointError) as error:
    alarms.check_finite(tmp_path, 12, metrics, ids)
  assert "step 12: train/loss_lm not finite" in str(error.value)
  assert f"{tmp_path}/nonfinite_12.json" in str(error.value)
  report = json.loads((tmp_path / "nonfinite_12.json").read_text())
  assert report["ids"] == ids and report["step"] == 12
  np.testing.assert_equal(float(report["metrics"]["train/loss_lm"]), value)


@pytest.fixture
def warnings(monkeypatch):
  said = []
  monkeypatch.setattr(
    logging, "warning", lambda text, *a: said.append(text % a)
  )
  return said


def test_collapse_is_reported_once(warnings):
  rng = np.random.default_rng(0)
  alarm = alarms.CollapseAlarm(window=100)
  losses = alarms.ITM_COLLAPSED + 0.02 * rng.standard_normal(500)
  rang = [step for step, x in enumerate(losses) if alarm.update(step, x)]
  assert rang == [99]
  assert len(warnings) == 1
  assert "loss_itm" in warnings[0] and "config.init.weights" in warnings[0]
  np.testing.assert_allclose(alarms.ITM_COLLAPSED, 0.6365, atol=1e-4)


@pytest.mark.parametrize(
  "losses",
  [
    np.linspace(0.75, 0.50, 300),  # falls through the value
    np.full(300, 0.55),  # learns
    np.full(99, 0.6365),  # too early to tell
    np.tile([0.45, 0.45, 0.823, 0.823], 75) + 0.02,  # scatters high
  ],
)
def test_healthy_losses_do_not_ring(warnings, losses):
  alarm = alarms.CollapseAlarm(window=100)
  for step, loss in enumerate(losses):
    assert not alarm.update(step, loss)
  assert not warnings


@pytest.mark.parametrize(
  "first, second, rings",
  [
    (0.009, 0.009, True),
    (-0.009, -0.009, True),
    (0.009, -0.009, True),
    (0.011, 0.0, False),
    (0.0, 0.011, False),
    (-0.011, 0.0, False),
  ],
)
def test_both_halves_of_the_window_count(warnings, first, second, rings):
  """Windows of odd length too: the middle one belongs to neither half."""
  for window in (4, 5):
    alarm = alarms.CollapseAlarm(window)
    losses = [first] * 2 + [0.0] * (window - 4) + [second] * 2
    rang = [
      alarm.update(n, alarms.ITM_COLLAPSED + x) for n, x in enumerate(losses)
    ]
    assert rang == [False] * (window - 1) + [rings]


def test_a_collapsed_head_has_the_entropy_of_a_third():
  """One pair in three matches, and "no match" is always the answer."""
  entropy = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
  assert pytest.approx(entropy, abs=1e-9) == alarms.ITM_COLLAPSED


def test_a_window_is_four_hundred_losses(warnings):
  alarm = alarms.CollapseAlarm()
  rang = [n for n in range(500) if alarm.update(n, alarms.ITM_COLLAPSED)]
  assert rang == [399]
