"""Visual dialog: what a candidate attends to, its score, and the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax import build
from blip_jax.models import blip
from blip_jax.tasks import dialog
from tests import helpers

RNG = jax.random.key(0)
MODEL = blip.Blip(helpers.ONE_WIDTH)
TASK = dialog.Dialog(MODEL)


@pytest.fixture(scope="module")
def params():
  return helpers.sharper(helpers.init("dialog", helpers.ONE_WIDTH, RNG), 5)


@pytest.fixture(scope="module")
def batch():
  """Two dialogs of three rounds with up to four candidates; some are not
  there, and no dialog has the second round."""
  rng = np.random.default_rng(0)
  lengths = np.array(
    [
      [[9, 7, 8, 9], [0, 0, 0, 0], [6, 5, 0, 0]],
      [[5, 5, 9, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
    ]
  )
  tokens = lambda *shape: rng.integers(4, 400, shape).astype(np.int32)
  label = np.zeros(lengths.shape, np.int32)
  label[0, 0, 2] = label[0, 2, 1] = label[1, 0, 0] = 1
  pixels = rng.standard_normal((2, 32, 32, 3)).astype(np.float32)
  return {
    "image": pixels,
    "context_ids": tokens(2, 6),
    "context_mask": np.array([[1] * 6, [1] * 4 + [0] * 2], np.int32),
    "input_ids": tokens(2, 3, 4, 9),
    "attention_mask": (np.arange(9) < lengths[..., None]).astype(np.int32),
    "label": label,
  }


@functools.partial(jax.jit, static_argnames="train")
def loss(params, batch, train=False):
  return TASK.loss(
    params, None, batch, rng=RNG, step=jnp.int32(0), train=train
  )[0]


score = jax.jit(functools.partial(dialog.score, MODEL))


@jax.jit
def match(params, image, ids, mask, context=None):
  """ITM's logits of one text and one image, by the methods of the model."""
  apply = functools.partial(MODEL.apply, {"params": params})
  states = apply(image[None], method="encode_image")
  if context is not None:
    # Without the padding, so that no mask is needed.
    read = apply(
      context[None], jnp.ones_like(context)[None], method="encode_text"
    )
    states = jnp.concatenate([states, read], axis=1)
  kv = apply(states, method="image_kv")
  return apply(ids[None], mask[None], kv, method="match")[0]


def places(batch):
  return np.argwhere(batch["attention_mask"].any(axis=-1)).tolist()


def test_a_score_is_that_of_the_text_alone(params, batch):
  """With image and context in one sequence, and nothing that is padding."""
  scores = np.asarray(score(params, batch))
  for b, r, c in places(batch):
    end = batch["context_mask"][b].sum()
    wrong, right = match(
      params,
      batch["image"][b],
      batch["input_ids"][b, r, c],
      batch["attention_mask"][b, r, c],
      batch["context_ids"][b, :end],
    )
    assert scores[b, r, c] == pytest.approx(float(right - wrong), abs=1e-4)
  there = batch["attention_mask"].any(axis=-1)
  assert not scores[~there].any() and scores[there].all()


def test_without_a_context_scores_are_those_of_itm(params, batch):
  """A context that is nothing but padding leaves what pre-training knows."""
  empty = np.zeros_like(batch["context_mask"])
  scores = np.asarray(score(params, {**batch, "context_mask": empty}))
  with_context = np.asarray(score(params, batch))
  for b, r, c in places(batch):
    wrong, right = match(
      params,
      batch["image"][b],
      batch["input_ids"][b, r, c],
      batch["attention_mask"][b, r, c],
    )
    assert scores[b, r, c] == pytest.approx(float(right - wrong), abs=1e-4)
    assert abs(scores[b, r, c] - with_context[b, r, c]) > 1e-3


def test_the_loss_is_the_mean_over_the_candidates_that_are_there(params, batch):
  scores = np.asarray(score(params, batch))
  losses = [
    np.logaddexp(0, -scores[place] if batch["label"][place] else scores[place])
    for place in map(tuple, places(batch))
  ]
  assert len(losses) == 9
  assert loss(params, batch) == pytest.approx(np.mean(losses), rel=1e-4)
  # Whatever the padding is.
  hidden = batch["attention_mask"] == 0
  noise = {**batch, "input_ids": np.where(hidden, 99, batch["input_ids"])}
  noise["context_ids"] = np.where(
    batch["context_mask"] == 0, 99, batch["context_ids"]
  )
  noise["label"] = np.where(hidden.all(axis=-1), 1, batch["label"])
  assert loss(params, noise) == pytest.approx(np.mean(losses), rel=1e-4)


def test_the_context_is_trained(params, batch):
  """The gradient reaches the encoder through the caption alone, too."""
  grads = jax.grad(loss)(params, batch)
  rows = np.asarray(grads["text_encoder"]["word_embeddings"])
  only_in_context = np.setdiff1d(
    batch["context_ids"][0, 1:], batch["input_ids"]
  )
  assert len(only_in_context)
  assert (np.abs(rows[only_in_context]).max(axis=-1) > 1e-6).all()
  assert helpers.norm(grads["visual_encoder"]) > 0


def test_a_batch_of_blanks_has_no_loss(params, batch):
  empty = {**batch, "attention_mask": np.zeros_like(batch["attention_mask"])}
  assert loss(params, empty) == 0
  assert not np.asarray(score(params, empty)).any()


def make_config(**changes):
  config = dialog.defaults()
  config.tokenizer = "scenes"
  config.model.image_size = 32
  config.model.variant = "tiny"
  config.data.max_length = config.dialog.context_length = 16
  config.update_from_flattened_dict(changes)
  return config


def test_towers_of_different_widths_are_refused():
  build.build(make_config())
  with pytest.raises(ValueError, match=r"1024 for .*config\.model\.variant=b"):
    build.build(make_config(**{"model.variant": "large"}))


def test_checks_of_the_config():
  config = dialog.defaults()
  dialog.check(config)
  for key in ("rounds", "negatives", "max_rounds", "max_candidates"):
    wrong = make_config(**{f"dialog.{key}": 0})
    with pytest.raises(ValueError, match=rf"config\.dialog\.{key}"):
      dialog.check(wrong)
