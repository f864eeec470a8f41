"""What pre-training and retrieval share: ITC and ITM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.models import blip
from blip_jax.tasks import align, pretrain
from blip_jax.tasks import momentum as momentum_lib
from tests import helpers

MODEL = blip.Blip(helpers.BLIP)


def make_align(**fields):
  values = dict(queue_size=3, ema_decay=0.9, alpha=0.4, alpha_ramp_steps=0)
  return align.Align(MODEL, **{**values, **fields})


def test_an_example_has_a_negative_if_its_row_has_a_weight():
  """Two groups of three; rows and columns of zeros differ."""
  t2i = jnp.array(
    [
      [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]],
      [[0.0, 1e-9, 0.0], [0.0, 0.0, 0.0], [5.0, 0.0, 0.0]],
    ]
  )
  i2t = np.zeros((2, 3, 3), np.float32)
  i2t[1, 2, 0] = 0.5
  keys = []

  def sample(key, weights):
    keys.append(key)
    return weights.argmax(-1)

  task = make_align(groups=2, sample=sample)
  images, texts = task.negatives(jax.random.key(0), t2i, jnp.asarray(i2t))
  assert images[1].tolist() == [True, True, False, True, False, True]
  assert texts[1].tolist() == [False] * 5 + [True]
  np.testing.assert_array_equal(images[0], [[1, 2, 0], [1, 0, 0]])
  np.testing.assert_array_equal(texts[0], [[0, 0, 0], [0, 0, 0]])
  # Images and texts are sampled independently.
  assert (jax.random.key_data(keys[0]) != jax.random.key_data(keys[1])).any()


def test_a_pair_is_its_own_positive_in_every_group():
  own = make_align(groups=2).own_pairs(4)
  ids = own.ids.reshape(2, 2)
  np.testing.assert_array_equal(
    align.hard_targets(ids, ids, own.queue_ids),
    [[[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]]] * 2,
  )


@pytest.mark.parametrize(
  "epochs, steps, scope, ramp, groups",
  [
    (2.0, 10, "global", 20, 1),
    (2.0, 10, "local", 20, 4),
    (0.25, 10, "global", 2, 1),  # 2.5 is rounded to even
    (0.0, 10, "global", 0, 1),
  ],
)
def test_the_ramp_is_in_epochs_and_groups_are_shards(
  epochs, steps, scope, ramp, groups
):
  config = pretrain.defaults()
  config.optim.steps_per_epoch = steps
  config.scope = scope
  config.pretrain.alpha_ramp_epochs = epochs
  assert align.arguments(config, 4) == dict(
    queue_size=57600,
    ema_decay=0.995,
    alpha=0.4,
    alpha_ramp_steps=ramp,
    groups=groups,
    num_shards=4,
  )


def unit(*rows):
  rows = np.array(rows, np.float32)
  return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize("groups", [1, 2])
def test_itc_by_hand(groups):
  """Equations of the paper, one example after the other, in numpy."""
  rng = np.random.default_rng(0)
  draw = lambda n: unit(*rng.normal(size=(n, 5))).astype(np.float64)
  image, text, image_m, text_m = (draw(4) for _ in range(4))
  queues = {"image": draw(3), "text": draw(3)}
  temp, alpha = 0.3, 0.4
  size = 4 // groups
  losses, expected_sims = [], []
  for mine, mine_m, others_m, queue in (
    (image, image_m, text_m, queues["text"]),
    (text, text_m, image_m, queues["image"]),
  ):
    rows = []
    for i in range(4):
      group = i // size * size
      candidates = np.concatenate([others_m[group : group + size], queue])
      sim, sim_m = candidates @ mine[i] / temp, candidates @ mine_m[i] / temp
      target = alpha * np.exp(sim_m) / np.exp(sim_m).sum()
      target[i % size] += 1 - alpha
      losses.append(-(target * (sim - np.log(np.exp(sim).sum()))).sum())
      rows.append(sim[:size])
    expected_sims.append(rows)
  features = align.Features(
    image_embeds=np.zeros((4, 2, 3)),
    image_feat=image,
    text_feat=text,
    image_feat_m=image_m,
    text_feat_m=text_m,
    momentum=momentum_lib.Momentum(
      {}, queues["image"], queues["text"], np.int32(0)
    ),
  )
  task = make_align(groups=groups)
  # JAX computes in float32.
  loss, sims = jax.jit(task.itc)(features, temp, alpha, task.own_pairs(4))
  np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
  for found, expected in zip(sims, expected_sims, strict=True):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def random_features(batch_size, queue_size, width=5):
  rng = np.random.default_rng(1)
  draw = lambda n: unit(*rng.normal(size=(n, width)).astype(np.float32))
  queues = draw(queue_size), draw(queue_size)
  features = align.Features(
    np.zeros((batch_size, 2, 3), np.float32),
    *(draw(batch_size) for _ in range(4)),
    momentum_lib.Momentum({}, *queues, np.int32(0)),
  )
  return jax.device_put(features)


@pytest.mark.parametrize("groups, shards", [(1, 1), (1, 2), (2, 2), (1, 5)])
def test_itc_in_blocks_is_the_same(groups, shards, monkeypatch):
  """Loss, similarities and gradients; five shards do not split the batch."""
  features = random_features(12, 3)
  # Of captions of the same images, in the batch and in the queue.
  positives = align.Positives(jnp.arange(12) // 3, jnp.array([-100, 2, 0]))
  task = make_align(groups=groups, num_shards=shards)

  def compute(rows):
    monkeypatch.setattr(align, "BLOCK_ROWS", rows)

    def loss(image, text, temp):
      found = features._replace(image_feat=image, text_feat=text)
      return task.itc(found, temp, jnp.float32(0.4), positives)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
      features.image_feat, features.text_feat, jnp.float32(0.3)
    )

  whole = compute(12)
  for rows in (1, 2, 5):
    found = compute(rows)
    assert task._blocks(12)[1] > 1
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      found,
      whole,
    )


def test_itc_of_a_large_batch_needs_less_memory_in_blocks(monkeypatch):
  """What the compiler says about 1,024 examples and a queue of 8,192."""
  features = jax.eval_shape(lambda: random_features(1024, 8192, 16))
  task = make_align(queue_size=8192)

  def loss(features, image):
    found = features._replace(image_feat=image)
    own = task.own_pairs(1024)
    return task.itc(found, jnp.float32(0.1), jnp.float32(0.4), own)[0]

  def needs(rows):
    monkeypatch.setattr(align, "BLOCK_ROWS", rows)
    step = jax.jit(jax.grad(loss, 1))
    compiled = step.lower(features, features.image_feat).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert needs(128) < 0.4 * needs(1024)


def test_itm_classifies_own_pairs_and_two_kinds_of_negatives():
  """A stub that knows which text sees which image: text i is the token i, and
  the keys of image i are i."""
  seen = []

  def run(params, method, ids, mask, kv):
    assert method == "match"
    texts, images = ids[:, 0], jnp.repeat(kv[0], len(ids) // len(kv[0]))
    seen.append((texts.tolist(), images.tolist()))
    # Sure, and always right.
    margin = jnp.where(texts == images, 2.0, -2.0)
    return jnp.stack([-margin, margin], axis=1) / 2

  ids = jnp.arange(3)[:, None]
  negatives = [
    (jnp.array([[1, 2, 0]]), jnp.array([True, True, True])),
    (jnp.array([[2, 0, 1]]), jnp.array([True, False, True])),
  ]
  loss, accuracy = make_align().itm(
    run,
    {},
    jnp.zeros((3, 1, 1)),
    jnp.arange(3)[None],  # of one layer
    ids,
    jnp.ones_like(ids),
    negatives,
  )
  assert seen == [
    ([0, 2, 1, 0, 2, 1], [0, 0, 1, 1, 2, 2]),
    ([0, 1, 2], [1, 2, 0]),
  ]
  np.testing.assert_allclose(loss, np.log1p(np.exp(-2.0)), rtol=1e-5)
  assert accuracy == 1


def test_a_wrong_answer_of_itm_counts_once_in_nine():
  def run(params, method, ids, mask, kv):
    return jnp.tile(jnp.array([[1.0, 0.0]]), (len(ids), 1))  # "no match"

  ids = jnp.arange(3)[:, None]
  everybody = jnp.ones(3, bool)
  loss, accuracy = make_align().itm(
    run,
    {},
    jnp.zeros((3, 1, 1)),
    jnp.arange(3)[None],  # of one layer
    ids,
    jnp.ones_like(ids),
    [(jnp.array([[1, 2, 0]]), everybody)] * 2,
  )
  # A third of the pairs match.
  np.testing.assert_allclose(accuracy, 2 / 3, rtol=1e-6)
  right, wrong = np.log1p(np.exp(-1.0)), np.log1p(np.exp(1.0))
  np.testing.assert_allclose(loss, (2 * right + wrong) / 3, rtol=1e-5)
