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
  ids = np.random.default_rng(3).integers(4, 400, (2, 2, 5))
  mask = [[[1] * 5, [0] * 5], [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]]
  batch = helpers.pair_batch(2)
  return {
    "image": batch["image"],
    "question_ids": np.asarray(batch["input_ids"]),
    "question_mask": np.array([[1] * 6, [1] * 4 + [0] * 2]),
    "answer_ids": ids,
    "answer_mask": np.array(mask),
    "answer_weight": np.array([[1.0, 0.0], [0.7, 0.3]]),
  }


def test_answers_are_weighted_and_padding_is_ignored(answers):
  """The loss is the weighted sum of each answer's loss, divided by the number
  of questions."""
  task = vqa.Vqa(MODEL)
  params = helpers.init("vqa", helpers.BLIP, RNG)

  @jax.jit
  def loss(batch):
    return task.loss(
      params, None, batch, rng=RNG, step=jnp.int32(0), train=False
    )[0]

  total = loss(answers)
  alone = [
    float(loss({**answers, "answer_weight": np.eye(4)[n].reshape(2, 2)}))
    for n in (0, 2, 3)
  ]
  expected = alone[0] + 0.7 * alone[1] + 0.3 * alone[2]
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  padding = answers["answer_ids"].copy()
  padding[0, 1] = 99
  np.testing.assert_allclose(
    loss({**answers, "answer_ids": padding}), total, rtol=1e-6
  )
  # The decoder does not attend to masked tokens of a question.
  hidden = answers["question_ids"].copy()
  hidden[1, 4:] = 99
  np.testing.assert_allclose(
    loss({**answers, "question_ids": hidden}), total, rtol=1e-5
  )


@pytest.fixture(scope="module")
def asked():
  """Golden weights, a video of three frames, and a question about it."""
  rng = np.random.default_rng(0)
  video = rng.integers(0, 256, (2, 3, 32, 32, 3)).astype(np.uint8)
  ids = rng.integers(4, 400, (2, 6)).astype(np.int32)
  return helpers.params("blip_vqa"), video, ids


def test_a_question_attends_to_all_frames(asked):
  """Composed of functions that are compared with the original one by one."""
  params, video, ids = asked
  mask = np.ones_like(ids)
  model = blip.Blip(helpers.BLIP, answers=True)
  found = jax.jit(vqa.read, static_argnums=0)(model, params, video, ids, mask)

  @jax.jit
  def composed(params, frames):
    apply = functools.partial(model.apply, {"params": params})
    encode = functools.partial(apply, method="encode_image")
    tokens = jnp.concatenate(
      [encode(base.normalise(frame)) for frame in frames], axis=1
    )
    assert tokens.shape == (2, len(frames) * 17, 48)
    kv = apply(tokens, method="image_kv")
    return apply(jnp.asarray(ids), jnp.asarray(mask), kv, method="fuse")

  frames = [*video.swapaxes(0, 1)]
  np.testing.assert_allclose(found, composed(params, frames), atol=1e-5)
  alone = composed(params, frames[:1])
  assert not np.allclose(found, alone, atol=1e-2)


def test_several_questions_about_each_image(asked):
  params, video, ids = asked
  model = blip.Blip(helpers.BLIP, answers=True)
  read = jax.jit(vqa.read, static_argnums=0)
  ids = np.concatenate([ids, ids + 1])
  mask = np.ones_like(ids)
  found = read(model, params, video[:, 0], ids, mask)
  each = read(model, params, np.repeat(video[:, 0], 2, axis=0), ids, mask)
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
