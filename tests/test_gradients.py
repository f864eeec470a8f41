"""Gradients accumulated over micro-batches are those of the whole batch."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blip_jax import train
from blip_jax.models import blip
from blip_jax.runtime import saved_arrays, sharding, snapshot, train_state
from blip_jax.tasks import caption, gradients
from tests import helpers, short_runs, test_mesh

TASKS = ("caption", "caption of groups", "vqa", "nlvr", "dialog")


def make_task(name):
  if name.startswith("caption"):
    model = blip.Blip(helpers.BLIP)
    return caption.Caption(
      model, prompt_length=3, groups=1 + 3 * (name != "caption")
    )
  return test_mesh.make_task(name, None)


@functools.cache
def rows_of(name):
  """Sixteen examples; some weigh more than others."""
  rows = test_mesh.rows_of(name)
  if name == "dialog":
    rows["attention_mask"][::4, :, 1:] = 0
  return rows


def make_state(task, mesh):
  if not isinstance(task, caption.Caption):
    return test_mesh.make_state(task, optax.identity(), mesh)
  params = helpers.init("caption", helpers.BLIP, jax.random.key(0))
  return train_state.create(lambda _: (params, None), optax.identity(), mesh)


def step(task, accum_steps):
  """The jitted gradients and metrics, compiled as a training step is."""

  @jax.jit
  def of_batch(state, batch):
    return gradients.of_batch(
      task,
      state.params,
      None,
      batch,
      rng=jax.random.key(0),
      step=jnp.int32(1),
      accum_steps=accum_steps,
    )

  return of_batch


def compute(name, accum_steps, shape=(1, 1, 1)):
  mesh = test_mesh.make_mesh(shape)
  task = make_task(name)
  state = make_state(task, mesh)
  with sharding.activate(mesh):
    batch = sharding.put_batch(rows_of(name), mesh)
    grads, (_, metrics) = step(task, accum_steps)(state, batch)
  return jax.device_get((grads, metrics))


@functools.cache
def at_once(name):
  return compute(name, 1)


def assert_same(found, expected):
  (grads, metrics), (grads_1, metrics_1) = found, expected
  assert metrics.keys() == metrics_1.keys()
  for metric, value in metrics_1.items():
    np.testing.assert_allclose(metrics[metric], value, rtol=1e-5)
  error = helpers.norm(jax.tree.map(np.subtract, grads, grads_1))
  assert error / helpers.norm(grads_1) < 1e-5


@pytest.mark.parametrize("name", TASKS)
def test_micro_batches_add_up_to_the_batch(name):
  """Although captions have different lengths, questions different weights, and
  dialogs different numbers of candidates."""
  assert_same(compute(name, 4), at_once(name))


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=pytest.mark.slow) for n in TASKS[1:]]
)
def test_on_a_mesh(name):
  assert_same(compute(name, 2, (2, 2, 2)), at_once(name))


def test_parts_have_different_numbers_of_terms():
  """Otherwise the test above would not see wrong weights."""
  for name in ("caption", "caption of groups", "dialog"):
    num_terms = jax.jit(make_task(name).num_terms)
    rows = rows_of(name)
    parts = [{key: x[k::4] for key, x in rows.items()} for k in range(4)]
    counts = [np.asarray(num_terms(part)).ravel() for part in parts]
    assert len({*map(tuple, counts)}) > 1


def test_micro_batches_need_less_memory():
  """Gradients are split like the parameters, and examples stay where they
  are: a quarter of the examples needs little more than a quarter."""
  mesh = test_mesh.make_mesh((2, 4, 1))
  task = make_task("nlvr")
  state = make_state(task, mesh)
  rows = {k: np.concatenate([x] * 8) for k, x in rows_of("nlvr").items()}
  with sharding.activate(mesh):
    batch = sharding.put_batch(rows, mesh)
    whole, parts = (
      step(task, accum_steps).lower(state, batch).compile()
      for accum_steps in (1, 4)
    )
  size = lambda program: program.memory_analysis().temp_size_in_bytes
  assert size(parts) < 0.4 * size(whole)


def test_a_run_is_resumed_bit_for_bit(tmp_path, monkeypatch):
  """With dropout, which draws masks for each micro-batch."""
  short_runs.make_quick(monkeypatch)
  config = short_runs.shrunk_config("caption_coco")
  config.grad_accum_steps = 4
  config.num_steps = 3
  config.checkpoint.update(every_steps=1, keep=3)
  for split in ("val", "test"):
    config.evals[split].source = ""
  whole, cut = tmp_path / "whole", tmp_path / "cut"
  train.train(config, str(whole))
  shutil.copytree(whole, cut)
  shutil.rmtree(cut / "checkpoints/3")
  train.train(config, str(cut))
  second, third, again = (
    saved_arrays.digest(
      saved_arrays.load_to_host(snapshot.find(folder), "params")
    )
    for folder in (whole / "checkpoints/2", whole, cut)
  )
  assert third == again != second
