"""One device and several meshes of eight give the same numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blip_jax import train
from blip_jax.models import blip, tying
from blip_jax.models import nlvr as nlvr_model
from blip_jax.plan import traffic
from blip_jax.runtime import sharding, train_state
from blip_jax.tasks import (
  dialog,
  exchange,
  losses,
  nlvr,
  pretrain,
  retrieval,
  vqa,
)
from tests import helpers

# Of retrieval, ITC is within a shard and ITM negatives are from all, as in
# COCO's recipe.
SCOPES = ("global", "local", "retrieval", "vqa", "nlvr", "dialog")
# All axes at once.
MESH = (2, 2, 2)
OTHERS = [
  ("global", (1, 8, 1)),
  ("global", (2, 1, 4)),
  ("local", (8, 1, 1)),
  ("groups", (2, 2, 2)),
  ("groups", (8, 1, 1)),
]


def make_task(scope, mesh):
  """Local groups are those of eight shards, whatever the mesh is."""
  if scope == "vqa":
    return vqa.Vqa(blip.Blip(helpers.BLIP, answers=True))
  if scope == "nlvr":
    return nlvr.Nlvr(nlvr_model.Nlvr(helpers.BLIP))
  if scope == "dialog":
    return dialog.Dialog(blip.Blip(helpers.ONE_WIDTH))
  fields = dict(
    queue_size=12,
    ema_decay=0.995,
    alpha=0.4,
    alpha_ramp_steps=0,
    groups=1 if scope in ("global", "groups") else 8,
    num_shards=sharding.num_data_shards(mesh),
  )
  if scope == "groups":  # of negatives, over several shards or a part of one
    fields["negative_group"] = 8
  task = retrieval.Retrieval if scope == "retrieval" else pretrain.Pretrain
  return task(blip.Blip(helpers.BLIP), **fields)


def make_mesh(shape):
  sizes = dict(zip(sharding.AXES, shape, strict=True))
  return sharding.make_mesh(sizes, jax.devices()[: int(np.prod(shape))])


def batch():
  rng = np.random.default_rng(0)
  lengths = rng.integers(4, 12, 16)
  return {
    "image": rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8),
    "input_ids": rng.integers(5, 400, (16, 12), dtype=np.int32),
    "attention_mask": (np.arange(12) < lengths[:, None]).astype(np.int32),
    "image_id": rng.integers(0, 12, 16, dtype=np.int32),
  }


def questions():
  """The texts as questions with up to three answers each."""
  rng = np.random.default_rng(1)
  pairs = batch()
  count = rng.integers(1, 4, 16)
  weight = rng.random((16, 3), dtype=np.float32)
  mask = np.ones((16, 3, 5), np.int32)
  mask[..., 3:] = rng.integers(0, 2, (16, 3, 1))
  return {
    "image": pairs["image"],
    "question_ids": pairs["input_ids"],
    "question_mask": pairs["attention_mask"],
    "answer_ids": rng.integers(5, 400, (16, 3, 5), dtype=np.int32),
    "answer_mask": mask,
    "answer_weight": weight * (np.arange(3) < count[:, None]),
  }


def statements():
  """The texts as statements about an image and the next one."""
  rows = batch()
  image = rows.pop("image")
  return {
    "image_0": image,
    "image_1": np.roll(image, 1, axis=0),
    "input_ids": rows["input_ids"],
    "attention_mask": rows["attention_mask"],
    "label": rows["image_id"] % 2,
  }


def dialogs():
  """The texts as candidates, three for an image, and as captions."""
  rows = batch()
  ids, mask = rows["input_ids"], rows["attention_mask"]
  texts = (np.arange(16)[:, None] + np.arange(3)) % 16
  return {
    "image": rows["image"],
    "context_ids": ids,
    "context_mask": mask,
    "input_ids": ids[texts][:, None],
    "attention_mask": mask[texts][:, None],
    "label": (texts % 3 == 0).astype(np.int32)[:, None],
  }


def rows_of(scope):
  makers = {"vqa": questions, "nlvr": statements, "dialog": dialogs}
  return makers.get(scope, batch)()


def make_state(task, tx, mesh):
  """The goldens' weights, split over the mesh."""
  if isinstance(task, vqa.Vqa):
    golden = helpers.params("blip_vqa")
  elif isinstance(task, nlvr.Nlvr):
    golden = helpers.params("blip_nlvr")
  elif isinstance(task, dialog.Dialog):
    golden = helpers.init("dialog", helpers.ONE_WIDTH, jax.random.key(0))
  else:
    golden = helpers.params("blip_pretrain")
  if isinstance(task, pretrain.Pretrain):
    golden = tying.drop_tied(golden)
  elif isinstance(task, retrieval.Retrieval):
    del golden["text_decoder"]

  def init(given):
    return golden, task.init_momentum(golden, jax.random.key(1))

  return train_state.create(init, tx, mesh)


def losses_and_grads(scope, shape):
  mesh = make_mesh(shape)
  task = make_task(scope, mesh)
  state = make_state(task, optax.identity(), mesh)

  @jax.jit
  def step(state, batch):
    loss = lambda params: task.loss(
      params,
      state.momentum,
      batch,
      rng=jax.random.key(0),
      step=jnp.int32(1),
    )
    (_, (momentum, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(
      state.params
    )
    return momentum, metrics, grads

  with sharding.activate(mesh):
    rows = sharding.put_batch(rows_of(scope), mesh)
    momentum, metrics, grads = step(state, rows)
  return jax.device_get((momentum, metrics, grads))


@functools.cache
def one_device(scope):
  return losses_and_grads(scope, (1, 1, 1))


@pytest.mark.parametrize(
  "scope, shape",
  [
    *((scope, MESH) for scope in SCOPES),
    *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS),
  ],
  ids=str,
)
def test_losses_and_gradients(scope, shape):
  momentum, metrics, grads = one_device(scope)
  momentum_8, metrics_8, grads_8 = losses_and_grads(scope, shape)
  for name, value in metrics.items():
    np.testing.assert_allclose(metrics_8[name], value, rtol=1e-5, err_msg=name)
  # Relative to the global norm: gradients of key biases are rounding errors.
  error = helpers.norm(jax.tree.map(np.subtract, grads_8, grads))
  assert error / helpers.norm(grads) < 1e-5
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    momentum_8,
    momentum,
  )


def test_scopes_differ():
  """Otherwise the test above would not test both scopes."""
  (_, metrics, _), (_, others, _) = map(one_device, ("global", "local"))
  assert abs(metrics["loss_itc"] - others["loss_itc"]) > 1e-3


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("groups", [1, 2, 16])
def test_rows_are_only_sent_within_their_group(shape, groups):
  """And their gradients only to the device that has the row."""
  mesh = make_mesh(shape)
  split = sharding.batch_sharding(mesh)
  rng = np.random.default_rng(0)
  rows = rng.standard_normal((64, 5, 16), dtype=np.float32)
  index = rng.integers(0, 64 // groups, (groups, 64 // groups))

  def loss(rows):
    return (jnp.sin(exchange.take(jnp.tanh(rows), jnp.array(index))) ** 2).sum()

  with sharding.activate(mesh):
    placed = jax.device_put(rows, split)
    step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, split))
    compiled = step.lower(placed).compile()
    value, grad = compiled(placed)
  whole = np.arange(groups)[:, None] * (64 // groups) + index
  taken = lambda rows: jnp.tanh(rows)[whole.reshape(-1)]
  expected, expected_grad = jax.jit(
    jax.value_and_grad(lambda rows: (jnp.sin(taken(rows)) ** 2).sum())
  )(rows)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  np.testing.assert_allclose(grad, expected_grad, atol=1e-5)

  shards = sharding.num_data_shards(mesh)
  among = shards // groups if shards % groups == 0 else shards
  sent = rows.nbytes * among // shards
  moved = traffic.count(compiled.as_text(), "cpu").collectives
  found = {(c.kind, c.nbytes, len(c.group)) for c in moved if c.nbytes > 4}
  assert found == {("all-gather", sent, among), ("reduce-scatter", sent, among)}


def test_similarities_within_groups_stay_where_they_are():
  mesh = make_mesh((8, 1, 1))
  split = sharding.batch_sharding(mesh)
  rows = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split)
  within = lambda sim: losses.within_groups(sim[None], 8)
  with sharding.activate(mesh):
    compiled = jax.jit(within, out_shardings=split).lower(rows).compile()
  assert not traffic.count(compiled.as_text(), "cpu").collectives


def test_training_step_keeps_the_state_sharded():
  """Parameters, moments and momentum encoders keep their shardings."""
  mesh = make_mesh((2, 2, 2))
  task = make_task("global", mesh)
  tx = optax.adamw(1e-3)
  state = make_state(task, tx, mesh)
  before = jax.tree.map(lambda x: x.sharding, state)
  step = train.make_train_step(task, tx, seed=0)
  with sharding.activate(mesh):
    for steps_done in range(2):
      state, _ = step(state, sharding.put_batch(batch(), mesh), steps_done)
  assert step._cache_size() == 1  # not compiled again for its own state
  same = jax.tree.map(
    lambda x, old: x.sharding.is_equivalent_to(old, x.ndim), state, before
  )
  assert all(jax.tree.leaves(same))
  kernel = state.params["visual_encoder"]["blocks"]["fc_in"]["kernel"]
  assert kernel.addressable_shards[0].data.size * 4 == kernel.size
