"""VQA: weights of answers, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.models import blip
from blip_jax.tasks import base, vqa
from tests import helpers

MODEL = blip.Blip(helpers.BLIP)
RNG = jax.random.key(0)


@pytest.fixture(scope="module")
def answers():
  """Two questions with one and two answers; a place is padding."""
  ids = jax.random.randint(jax.random.key(3), (2, 2, 5), 4, 400)
  mask = jnp.array([[[1] * 5, [0] * 5], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]])
  batch = helpers.pair_batch(2)
  return {
    "image": batch["image"],
    "question_ids": batch["input_ids"],
    "question_mask": batch["attention_mask"].at[1, 4:].set(0),
    "answer_ids": ids,
    "answer_mask": mask,
    "answer_weight": jnp.array([[1.0, 0.0], [0.7, 0.3]]),
  }


def test_answers_are_weighted_and_padding_is_ignored(answers):
  """The loss is the weighted sum of each answer's loss, divided by the number
  of questions."""
  task = vqa.Vqa(MODEL)
  params = jax.jit(task.init)(RNG)

  @jax.jit
  def loss(batch):
    return task.loss(
      params, None, batch, rng=RNG, step=jnp.int32(0), train=False
    )[0]

  total = loss(answers)
  alone = [
    loss({**answers, "answer_weight": jnp.zeros((2, 2)).at[place].set(1.0)})
    for place in ((0, 0), (1, 0), (1, 1))
  ]
  expected = alone[0] + 0.7 * alone[1] + 0.3 * alone[2]
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  padding = answers["answer_ids"].at[0, 1].set(99)
  np.testing.assert_allclose(
    loss({**answers, "answer_ids": padding}), total, rtol=1e-6
  )
  # The decoder does not attend to masked tokens of a question.
  hidden = answers["question_ids"].at[1, 4:].set(99)
  np.testing.assert_allclose(
    loss({**answers, "question_ids": hidden}), total, rtol=1e-5
  )


@pytest.fixture(scope="module")
def asked():
  """Golden weights, a video of three frames, and a question about it."""
  rng = np.random.default_rng(0)
  video = rng.integers(0, 256, (2, 3, 32, 32, 3)).astype(np.uint8)
  ids = rng.integers(4, 400, (2, 6)).astype(np.int32)
  return helpers.params("blip_vqa"), jnp.asarray(video), jnp.asarray(ids)


def test_a_question_attends_to_all_frames(asked):
  """Composed of functions that are compared with the original one by one."""
  params, video, ids = asked
  mask = jnp.ones_like(ids)
  model = blip.Blip(helpers.BLIP, answers=True)
  found = jax.jit(vqa.read, static_argnums=0)(model, params, video, ids, mask)
  apply = functools.partial(model.apply, {"params": params})
  frames = [
    apply(base.normalise(video[:, n]), method="encode_image") for n in range(3)
  ]
  tokens = jnp.concatenate(frames, axis=1)
  assert tokens.shape == (2, 3 * 17, 48)
  kv = apply(tokens, method="image_kv")
  expected = apply(ids, mask, kv, method="fuse")
  np.testing.assert_allclose(found, expected, atol=1e-5)
  alone = apply(ids, mask, apply(frames[0], method="image_kv"), method="fuse")
  assert not np.allclose(found, alone, atol=1e-2)


def test_several_questions_about_each_image(asked):
  params, video, ids = asked
  model = blip.Blip(helpers.BLIP, answers=True)
  read = jax.jit(vqa.read, static_argnums=0)
  ids = jnp.concatenate([ids, ids + 1])
  mask = jnp.ones_like(ids)
  found = read(model, params, video[:, 0], ids, mask)
  each = read(model, params, jnp.repeat(video[:, 0], 2, axis=0), ids, mask)
  np.testing.assert_allclose(found, each, atol=1e-5)


def test_checks_of_the_config():
  config = vqa.defaults()
  vqa.check(config)
  config.evals.val.source = "scenes:val"
  with pytest.raises(ValueError, match=r"config\.vqa\.answer_list: .*generate"):
    vqa.check(config)
  config.vqa.inference = "generate"
  vqa.check(config)
  config.vqa.rank_score = "bleu"
  with pytest.raises(ValueError, match=r"config\.vqa\.rank_score: .*'bleu'"):
    vqa.check(config)
