"""Retrieval fine-tuning: targets, negatives, queue of ids."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax import build
from blip_jax.models import blip
from blip_jax.tasks import align, losses, retrieval
from blip_jax.tasks import momentum as momentum_lib
from tests import helpers

MODEL = blip.Blip(helpers.BLIP)
RNG = jax.random.key(0)


def make_retrieval(**fields):
  return retrieval.Retrieval(
    MODEL,
    **dict(
      queue_size=6, ema_decay=0.995, alpha=0.0, alpha_ramp_steps=0, **fields
    ),
  )


@pytest.fixture(scope="module")
def retrieval_state():
  task = make_retrieval()
  params = helpers.init("retrieval", helpers.BLIP, RNG)
  return params, jax.jit(task.init_momentum)(params, RNG)


@functools.partial(jax.jit, static_argnames="groups")
def retrieval_loss(params, momentum, batch, groups=1):
  task = make_retrieval(negative_groups=groups)

  def loss(params):
    return task.loss(
      params, momentum, batch, rng=RNG, step=jnp.int32(0), train=False
    )

  return jax.value_and_grad(loss, has_aux=True)(params)


def test_hard_targets_are_equal_for_captions_of_one_image():
  """Compared with targets written out by hand."""
  ids = jnp.array([7, 3, 7, 5])
  idx_queue = jnp.array([-100, 3, -100, 7, 9, -100])
  hard = align.hard_targets(ids[None], ids[None], idx_queue)[0]
  third, half = 1 / 3, 1 / 2
  expected = [
    [third, 0, third, 0, 0, 0, 0, third, 0, 0],
    [0, half, 0, 0, 0, half, 0, 0, 0, 0],
    [third, 0, third, 0, 0, 0, 0, third, 0, 0],
    [0, 0, 0, 1, 0, 0, 0, 0, 0, 0],
  ]
  np.testing.assert_allclose(hard, expected, rtol=1e-6)


def test_diagonal_targets_ignore_image_ids(retrieval_state):
  """With `itc_targets="idx"`, equal ids change the loss."""
  params, momentum = retrieval_state

  @functools.partial(jax.jit, static_argnames="targets")
  def loss_itc(ids, targets):
    task = make_retrieval(itc_targets=targets)
    _, (_, metrics) = task.loss(
      params,
      momentum,
      helpers.pair_batch(image_id=ids),
      rng=RNG,
      step=jnp.int32(0),
      train=False,
    )
    return metrics["loss_itc"]

  distinct, shared = jnp.array([1, 2, 3, 4]), jnp.array([1, 2, 1, 4])
  diagonal = loss_itc(distinct, targets="diagonal")
  np.testing.assert_allclose(
    diagonal, loss_itc(distinct, targets="idx"), rtol=1e-6
  )
  np.testing.assert_allclose(
    diagonal, loss_itc(shared, targets="diagonal"), rtol=1e-6
  )
  assert abs(diagonal - loss_itc(shared, targets="idx")) > 1e-4


@pytest.mark.parametrize(
  "scope, negatives, groups, negative_groups",
  [
    ("local", "global", 2, 1),
    ("local", "local", 2, 2),
    ("global", "local", 1, 2),
  ],
)
def test_itc_candidates_and_itm_negatives_have_separate_scopes(
  scope, negatives, groups, negative_groups
):
  config = retrieval.defaults()
  config.scope, config.retrieval.negatives = scope, negatives
  config.retrieval.itc_targets = "diagonal"
  config.optim.steps_per_epoch = 7
  task = retrieval.make(
    config, blip.Blip(helpers.BLIP), prompt_length=1, num_shards=2
  )
  assert (task.groups, task.negative_groups) == (groups, negative_groups)
  assert task.itc_targets == "diagonal" and task.alpha_ramp_steps == 7


@pytest.mark.parametrize("key", ["itc_targets", "negatives"])
def test_impossible_values_are_refused_by_name(key):
  config = retrieval.defaults()
  config.data.train = ("scenes:train",)
  config.retrieval[key] = "all"
  with pytest.raises(ValueError, match=rf"config\.retrieval\.{key}: .*'all'"):
    build.validate(config)


def test_the_queue_keeps_image_ids(retrieval_state):
  params, momentum = retrieval_state
  np.testing.assert_array_equal(momentum.idx_queue, momentum_lib.NO_IMAGE)
  batch = helpers.pair_batch(image_id=jnp.array([7, 3, 7, 5]))
  for expected in ([7, 3, 7, 5, -100, -100], [7, 5, 7, 5, 7, 3]):
    (_, (momentum, _)), _ = retrieval_loss(params, momentum, batch)
    np.testing.assert_array_equal(momentum.idx_queue, expected)


@jax.jit
def own_pairs(params, batch):
  """ITM's logits of the matching pairs."""
  apply = functools.partial(MODEL.apply, {"params": params})
  kv = apply(apply(batch["image"], method="encode_image"), method="image_kv")
  text = batch["input_ids"], batch["attention_mask"]
  return apply(*text, kv, method="match")


@pytest.mark.parametrize("groups", [1, 2])
def test_an_example_without_a_negative_is_masked(retrieval_state, groups):
  """The original crashes if all captions belong to one image."""
  params, momentum = retrieval_state
  batch = helpers.pair_batch(image_id=jnp.array([5, 5, 5, 5]))
  (loss, (_, metrics)), grads = retrieval_loss(params, momentum, batch, groups)
  assert np.isfinite(loss)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  # Only the matching pairs are left; their loss needs no other example.
  expected = -jax.nn.log_softmax(own_pairs(params, batch))[:, 1].mean()
  np.testing.assert_allclose(metrics["loss_itm"], expected, rtol=1e-4)


def test_negatives_are_never_of_the_same_image():
  same = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]])

  @jax.jit
  def sample(keys, same):
    weights = losses.hard_negative_weights(
      10 * same.astype(jnp.float32), same == 1, constant=0.0
    )
    return jax.vmap(lambda key: losses.sample_negatives(key, weights))(keys)

  sampled = np.asarray(sample(jax.random.split(RNG, 100), same[None]))
  assert (same[np.arange(4), sampled[:, 0]] == 0).all()


def test_negatives_are_sampled_by_the_softmax_alone():
  """Unlike in pre-training, no constant is added: an image that the model
  tells apart from a text with certainty is never its negative."""
  image_feat = np.eye(4, 8)
  # Text i resembles image i most, then the next one; the others hardly.
  text_feat = np.eye(4, 8) + 0.9 * np.roll(np.eye(4, 8), 1, axis=0)
  queue = np.zeros((6, 8))
  features = align.Features(
    image_embeds=np.zeros((4, 17, 48)),
    image_feat=image_feat,
    text_feat=text_feat,
    image_feat_m=image_feat,
    text_feat_m=text_feat,
    momentum=momentum_lib.Momentum({}, queue, queue, np.int32(0)),
  )
  recorded = []

  def record(key, weights):
    recorded.append(weights[0])
    return jnp.zeros(weights.shape[:2], jnp.int32)

  task = dataclasses.replace(make_retrieval(), sample=record)
  image_id = np.array([7, 3, 7, 5])
  task._sample_negatives(
    RNG, jax.device_put(features), jnp.float32(0.05), jnp.asarray(image_id)
  )
  similarities = np.exp(image_feat @ text_feat.T / 0.05)
  same = image_id[:, None] == image_id[None]
  weights_t2i, weights_i2t = recorded
  for weights, sim in (
    (weights_t2i, similarities.T),
    (weights_i2t, similarities),
  ):
    expected = np.where(same, 0, sim / sim.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-9)
    # A constant would dominate some of these weights.
    assert 0 < expected[~same].min() < 1e-7
