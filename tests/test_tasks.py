"""What fine-tuning tasks do that no golden shows: guards, padding, starts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax import build
from blip_jax.models import blip, families, nlvr
from blip_jax.tasks import caption, losses, retrieval, vqa
from blip_jax.tasks import momentum as momentum_lib
from blip_jax.tasks import nlvr as nlvr_task
from tests import helpers

MODEL = blip.Blip(helpers.BLIP)
RNG = jax.random.key(0)


def make_batch(rows=4, **more):
  keys = jax.random.split(jax.random.key(1), 2)
  ids = jax.random.randint(keys[1], (rows, 6), 4, 400)
  return {
    "image": jax.random.normal(keys[0], (rows, 32, 32, 3)),
    "input_ids": ids,
    "attention_mask": jnp.ones_like(ids),
    **more,
  }


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
  params = task.init(RNG)
  return params, task.init_momentum(params, RNG)


@functools.partial(jax.jit, static_argnames="groups")
def retrieval_loss(params, momentum, batch, groups=1):
  task = make_retrieval(negative_groups=groups)

  def loss(params):
    return task.loss(
      params, momentum, batch, rng=RNG, step=jnp.int32(0), train=False
    )

  return jax.value_and_grad(loss, has_aux=True)(params)


def test_captions_of_one_image_share_the_mass():
  """By hand, with the positives of each row written out."""
  ids = jnp.array([7, 3, 7, 5])
  idx_queue = jnp.array([-100, 3, -100, 7, 9, -100])
  hard = make_retrieval()._hard_targets(ids, idx_queue)
  third, half = 1 / 3, 1 / 2
  expected = [
    [third, 0, third, 0, 0, 0, 0, third, 0, 0],
    [0, half, 0, 0, 0, half, 0, 0, 0, 0],
    [third, 0, third, 0, 0, 0, 0, third, 0, 0],
    [0, 0, 0, 1, 0, 0, 0, 0, 0, 0],
  ]
  np.testing.assert_allclose(hard, expected, rtol=1e-6)


def test_a_pair_alone_is_a_positive_if_the_config_says_so(retrieval_state):
  """`itc_targets`: ids that differ change nothing, equal ones do."""
  params, momentum = retrieval_state
  task = make_retrieval(itc_targets="diagonal")
  np.testing.assert_array_equal(task.diagonal(4), np.eye(4, 10))

  @functools.partial(jax.jit, static_argnames="targets")
  def loss_itc(ids, targets):
    task = make_retrieval(itc_targets=targets)
    _, (_, metrics) = task.loss(
      params,
      momentum,
      make_batch(image_id=ids),
      rng=RNG,
      step=jnp.int32(0),
      train=False,
    )
    return metrics["loss_itc"]

  others, shared = jnp.array([1, 2, 3, 4]), jnp.array([1, 2, 1, 4])
  alone = loss_itc(others, targets="diagonal")
  np.testing.assert_allclose(alone, loss_itc(others, targets="idx"), rtol=1e-6)
  np.testing.assert_allclose(
    alone, loss_itc(shared, targets="diagonal"), rtol=1e-6
  )
  assert abs(alone - loss_itc(shared, targets="idx")) > 1e-4


@pytest.mark.parametrize(
  "scope, negatives, groups, negative_groups",
  [
    ("local", "global", 2, 1),
    ("local", "local", 2, 2),
    ("global", "local", 1, 2),
  ],
)
def test_candidates_and_negatives_have_a_scope_each(
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
def test_what_retrieval_cannot_do_is_named(key):
  config = retrieval.defaults()
  config.data.train = ("scenes:train",)
  config.retrieval[key] = "all"
  with pytest.raises(ValueError, match=rf"config\.retrieval\.{key}: .*'all'"):
    build.validate(config)


def test_the_queue_keeps_the_ids(retrieval_state):
  params, momentum = retrieval_state
  assert (momentum.idx_queue == momentum_lib.NO_IMAGE).all()
  batch = make_batch(image_id=jnp.array([7, 3, 7, 5]))
  for expected in ([7, 3, 7, 5, -100, -100], [7, 5, 7, 5, 7, 3]):
    (_, (momentum, _)), _ = retrieval_loss(params, momentum, batch)
    np.testing.assert_array_equal(momentum.idx_queue, expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_row_without_a_negative_is_masked(retrieval_state, groups):
  """The original crashes where all captions are of one image."""
  params, momentum = retrieval_state
  batch = make_batch(image_id=jnp.array([5, 5, 5, 5]))
  (loss, (_, metrics)), grads = retrieval_loss(params, momentum, batch, groups)
  assert np.isfinite(loss)
  assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
  # What is left are true pairs, whose loss does not need the others.
  apply = functools.partial(MODEL.apply, {"params": params})
  kv = apply(apply(batch["image"], method="encode_image"), method="image_kv")
  text = batch["input_ids"], batch["attention_mask"]
  logits = apply(*text, kv, method="match")
  expected = -jax.nn.log_softmax(logits)[:, 1].mean()
  np.testing.assert_allclose(metrics["loss_itm"], expected, rtol=1e-4)


def test_negatives_are_never_of_the_same_image():
  same = jnp.array([[[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]])
  weights = losses.hard_negative_weights(
    10 * same.astype(jnp.float32), same == 1, constant=0.0
  )
  keys = jax.random.split(RNG, 100)
  drawn = jax.vmap(lambda key: losses.sample_negatives(key, weights))(keys)
  assert (same[0][jnp.arange(4)[None], drawn[:, 0]] == 0).all()


@pytest.fixture(scope="module")
def answers():
  """Two questions, with one and two answers, and a row of padding."""
  ids = jax.random.randint(jax.random.key(3), (4, 5), 4, 400)
  mask = jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0] * 5])
  batch = make_batch(2)
  return {
    "image": batch["image"],
    "question_ids": batch["input_ids"],
    "question_mask": batch["attention_mask"].at[1, 4:].set(0),
    "answer_ids": ids,
    "answer_mask": mask,
    "answer_weight": jnp.array([1.0, 0.7, 0.3, 0.0]),
    "answer_question": jnp.array([0, 1, 1, 0]),
  }


def test_answers_weigh_in_and_padding_does_not(answers):
  """Each answer alone, times its weight, over the number of questions."""
  task = vqa.Vqa(MODEL)
  params = task.init(RNG)

  @jax.jit
  def loss(batch):
    return task.loss(
      params, None, batch, rng=RNG, step=jnp.int32(0), train=False
    )[0]

  whole = loss(answers)
  alone = [
    loss({**answers, "answer_weight": jnp.zeros(4).at[i].set(1.0)})
    for i in range(3)
  ]
  expected = alone[0] + 0.7 * alone[1] + 0.3 * alone[2]
  np.testing.assert_allclose(whole, expected, rtol=1e-5)
  padding = answers["answer_ids"].at[3].set(99)
  np.testing.assert_allclose(
    loss({**answers, "answer_ids": padding}), whole, rtol=1e-6
  )
  # Tokens of a question that its mask leaves out are not looked at.
  hidden = answers["question_ids"].at[1, 4:].set(99)
  np.testing.assert_allclose(
    loss({**answers, "question_ids": hidden}), whole, rtol=1e-5
  )


def make_caption_loss(prompt_length):
  task = caption.Caption(MODEL, prompt_length)
  params = task.init(RNG)
  return lambda batch: task.loss(
    params, None, batch, rng=RNG, step=jnp.int32(0), train=False
  )[0]


def test_padding_changes_no_caption_loss():
  """Texts as long as the longest, or padded to a fixed length."""
  loss, batch = make_caption_loss(prompt_length=2), make_batch()
  pad = functools.partial(jnp.pad, pad_width=((0, 0), (0, 9)))
  padded = {
    **batch,
    "input_ids": pad(batch["input_ids"]),
    "attention_mask": pad(batch["attention_mask"]),
  }
  np.testing.assert_allclose(loss(padded), loss(batch), rtol=1e-6)


def test_the_prompt_is_not_learned():
  """Its scores have no gradient but through the words behind it."""
  loss, batch = make_caption_loss(prompt_length=4), make_batch()
  only_prompt = batch["attention_mask"].at[:, 4:].set(0)
  assert loss({**batch, "attention_mask": only_prompt}) == 0
  assert loss(batch) > 0


def test_equal_images_and_twins_are_one_image():
  """Copies of one cross-attention see in a pair of equal images what the
  single one sees in the image (the start of NLVR fine-tuning)."""
  single = families.init("feature", helpers.BLIP, RNG)
  twin = families.init("nlvr", helpers.BLIP, RNG)
  for i in range(helpers.MED.depth):
    layer = dict(single["text_encoder"][f"layer_{i}"])
    cross = dict(layer["crossattention"])
    ln = cross.pop("ln")
    layer["crossattention"] = {"image_0": cross, "image_1": cross, "ln": ln}
    twin["text_encoder"][f"layer_{i}"] = layer
  for name in ("word_embeddings", "position_embeddings", "ln_embed"):
    twin["text_encoder"][name] = single["text_encoder"][name]
  twin["visual_encoder"] = single["visual_encoder"]
  batch = make_batch()
  text = batch["input_ids"], batch["attention_mask"]
  found = nlvr.Nlvr(helpers.BLIP).apply(
    {"params": twin}, jnp.concatenate([batch["image"]] * 2), *text
  )
  apply = functools.partial(MODEL.apply, {"params": single})
  kv = apply(apply(batch["image"], method="encode_image"), method="image_kv")
  fused = apply(*text, kv, method="fuse")
  head = nlvr.ClsHead(helpers.MED.width)
  expected = head.apply({"params": twin["cls_head"]}, fused[:, 0])
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_nlvr_takes_two_images_a_statement():
  task = nlvr_task.Nlvr(nlvr.Nlvr(helpers.BLIP))
  batch = make_batch(label=jnp.array([1, 0, 1, 1]))
  batch["image_0"] = batch["image_1"] = batch.pop("image")
  loss, (momentum, metrics) = task.loss(
    task.init(RNG), None, batch, rng=RNG, step=jnp.int32(0), train=False
  )
  assert momentum is None and 0 <= metrics["accuracy"] <= 1
  np.testing.assert_allclose(loss, np.log(2), atol=0.3)
