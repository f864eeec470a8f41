"""VQA: weights of answers, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.models import blip
from blip_jax.tasks import vqa
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
  params = task.init(RNG)

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
