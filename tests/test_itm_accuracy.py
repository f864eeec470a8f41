"""ITM accuracy: padding, partners, masks, and chance."""

import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.evaluators import itm_accuracy
from tests import helpers
from tests.colour_task import (
  COLOURS,
  ColourImages,
  ColourTask,
  colour_split,
  evaluate,
)


@pytest.mark.parametrize("batch_size", [4, 8, 100])
def test_padding_does_not_count(batch_size):
  split = colour_split(ColourImages(bad=(3,)), batch_size)
  assert (
    evaluate(itm_accuracy.ItmAccuracy(split, ColourTask()))["itm_acc"] == 100
  )


def test_a_split_of_one_text_has_no_accuracy(caplog):
  split = colour_split(ColourImages(1) + ColourImages(1))
  assert evaluate(itm_accuracy.ItmAccuracy(split, ColourTask())) == {}
  assert "itm_acc is left out" in caplog.text


@pytest.mark.parametrize(
  "valid, partner",
  [
    ([1, 1, 1, 1], [2, 3, 0, 1]),
    ([1, 0, 1, 1], [2, None, 3, 0]),
    ([1, 1, 0, 0, 0, 0], [1, 0, None, None, None, None]),
    ([1, 1, 1, 0], [1, 2, 0, None]),
  ],
)
def test_partners_are_other_valid_rows(valid, partner):
  found = itm_accuracy._half_a_batch_away(jnp.array(valid, bool))
  for row, expected in enumerate(partner):
    assert expected is None or found[row] == expected


@pytest.mark.parametrize("answer, accuracy", [(1.0, 50.0), (0.0, 50.0)])
def test_a_constant_answer_scores_chance(answer, accuracy):
  task = ColourTask(
    match=lambda params, ids, mask, kv, legacy_cls=False: jnp.stack(
      [jnp.full(len(ids), 0.5), jnp.full(len(ids), answer)], axis=-1
    )
  )
  split = colour_split(ColourImages(), 8)
  assert evaluate(itm_accuracy.ItmAccuracy(split, task))["itm_acc"] == accuracy


def test_the_head_gets_the_mask_of_each_text():
  """This head is right only if the mask hides the padding, and nothing else."""
  pad = helpers.scenes_tokenizer().pad_id
  task = ColourTask()

  def match(params, ids, mask, image_kv, legacy_cls=False):
    logits = task.predict_fns["match"](params, ids, mask, image_kv)
    is_right = (mask == (ids != pad)).all(axis=-1)
    return jnp.where(is_right[:, None], logits, logits[:, ::-1])

  split = colour_split(ColourImages(), 8)
  # Texts of one to three words, so that their masks differ.
  for row, record in enumerate(split.source):
    record["caption"] = ["a ", "", "one big "][row % 3] + COLOURS[row]
  evaluator = itm_accuracy.ItmAccuracy(split, ColourTask(match=match))
  assert evaluate(evaluator) == {"itm_acc": 100}


def test_rows_of_one_image_are_never_wrong_pairs():
  """Half a batch away is another caption of the same image."""
  split = colour_split(ColourImages(4) + ColourImages(4), 8)
  for row, record in enumerate(split.source):
    record["caption"] = ["a ", "one "][row // 4] + record["caption"][0]
  evaluator = itm_accuracy.ItmAccuracy(split, ColourTask())
  assert evaluate(evaluator) == {"itm_acc": 100}


def test_the_order_of_rows_does_not_matter():
  """The head is wrong about some texts, so that partners make a difference."""
  images = ColourImages(captions=2)
  rows = [
    {
      **record,
      "id": f"{n}:{caption}",
      "image_id": n,
      "caption": caption,
    }
    for n, record in enumerate(images)
    for caption in record["caption"]
  ]

  def match(params, ids, mask, image_kv, legacy_cls=False):
    is_one_word = mask.sum(-1) <= 3
    is_red = image_kv[..., 0].reshape(-1).repeat(len(ids) // len(image_kv)) > 0
    says_match = is_one_word ^ is_red
    return jnp.stack([0.5 * jnp.ones(len(ids)), says_match], axis=-1)

  accuracies = set()
  for seed in range(6):
    order = np.random.default_rng(seed).permutation(len(rows))
    split = colour_split([rows[n] for n in order], 8)
    evaluator = itm_accuracy.ItmAccuracy(split, ColourTask(match=match))
    accuracies |= {evaluate(evaluator)["itm_acc"]}
  assert len(accuracies) == 1
