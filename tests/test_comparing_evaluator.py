"""Statements of a split: the file of predictions, accuracy, consistency."""

import csv
import json

import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax import defaults
from blip_jax.data import datasets, rejects, transforms
from blip_jax.evaluators import base, comparing
from blip_jax.runtime import sharding, train_state
from blip_jax.tasks import base as task_base
from blip_jax.tasks import nlvr
from tests import helpers


@pytest.fixture(scope="module")
def model():
  return helpers.make_model("nlvr")


def make_context(model, source, tmp_path, **changes):
  config = nlvr.defaults()
  config.evals.batch_size = 4
  config.data.max_length = 18
  config.update_from_flattened_dict(changes)
  return base.Context(
    "val",
    defaults.split(source),
    config,
    nlvr.Nlvr(model.module),
    nlvr.example(config, helpers.scenes_tokenizer(), transforms.EvalImage(16)),
    sharding.one_device(),
    rejects.BadSamples(max_fraction=0.9),
    str(tmp_path),
  )


def run(model, context):
  state = train_state.TrainState(0, model.params, None, None)
  (evaluator,) = comparing.build(context)
  return dict(evaluator.run(state))


def predictions(tmp_path):
  with open(tmp_path / "val_predictions.csv", newline="") as file:
    return dict(csv.reader(file))


def logits_of(model, source, swapped=False):
  """Of all rows, by the module itself."""
  records = [source[n] for n in range(len(source))]
  resize = transforms.EvalImage(16)
  pairs = np.array([[*map(resize, x["images"])] for x in records])
  texts = [x["statement"] for x in records]
  if swapped:
    pairs = pairs[:, ::-1]
    sides = {"left": "right", "right": "left"}
    words = [text.split() for text in texts]
    texts = [" ".join(sides.get(w, w) for w in text) for text in words]
  pixels = jnp.asarray(np.concatenate([pairs[:, 0], pairs[:, 1]]))
  tokens = helpers.scenes_tokenizer().encode(texts, 18)
  return np.asarray(model.apply(task_base.normalise(pixels), *tokens))


def test_a_split_is_predicted_and_scored(model, tmp_path):
  """Ten statements in batches of four; padding is no prediction."""
  results = run(model, make_context(model, "scenes:val?num=10", tmp_path))
  source = datasets.open_statements("scenes:val?num=10")
  logits = logits_of(model, source)
  predicted = logits[:, 1] > logits[:, 0]
  assert predictions(tmp_path) == {
    f"val-{n}": str(bool(predicted[n])) for n in range(10)
  }
  right = predicted == (np.arange(10) % 2 == 0)
  assert results["accuracy"] == pytest.approx(100 * right.mean())
  both = right.reshape(5, 2).all(axis=1)
  assert results["consistency"] == pytest.approx(100 * both.mean())
  assert np.isfinite(results["loss"])


def test_the_originals_evaluation_exchanges_half_of_the_pairs(model, tmp_path):
  """Here only on request; then the same ones every time."""
  split = "scenes:val?num=12"
  plain = run(model, make_context(model, split, tmp_path))
  context = make_context(
    model, split, tmp_path, **{"nlvr.legacy_eval_swap": True}
  )
  legacy = run(model, context)
  assert legacy == run(model, context)
  source = datasets.open_statements(split)
  sign = np.where(np.arange(12) % 2 == 0, 1, -1)
  losses = [
    np.logaddexp(0, -sign * np.diff(logits_of(model, source, swapped))[:, 0])
    for swapped in (False, True)
  ]
  assert plain["loss"] == pytest.approx(losses[0].mean(), rel=1e-4)
  swaps = [np.random.default_rng(n).random() < 0.5 for n in range(12)]
  assert 0 < sum(swaps) < 12
  expected = np.where(swaps, *losses[::-1]).mean()
  assert legacy["loss"] == pytest.approx(expected, rel=1e-4)


def test_pairs_without_an_image_repeated_ids_and_rows_without_labels(
  model, tmp_path, caplog
):
  """Are left out of the file; the last are left out of the scores."""
  helpers.write_images(tmp_path / "images")
  row = {"image_0": "0.png", "image_1": "1.png", "sentence": "two shapes"}
  rows = [
    row | {"identifier": "a", "label": True},
    row | {"identifier": "a", "label": False},
    row | {"identifier": "b", "label": True, "image_1": "2b.jpg"},
    row | {"identifier": "c", "label": True, "image_0": "nowhere.png"},
    row | {"identifier": "d", "label": True, "image_0": None},
    row | {"identifier": "e"},
  ]
  path = tmp_path / "n.json"
  path.write_text(json.dumps(rows))
  context = make_context(model, str(path), tmp_path)
  context.settings.image_root = str(tmp_path / "images")
  results = run(model, context)
  assert [*predictions(tmp_path)] == ["a", "e"]
  # Only the first row counts.
  is_true = predictions(tmp_path)["a"] == "True"
  assert results["accuracy"] == results["consistency"] == 100 * is_true
  assert "1 rows repeat the id of a statement" in caplog.text
  assert context.bad_samples.reasons.total() == 3


def test_without_any_label_nothing_is_scored(model, tmp_path):
  helpers.write_images(tmp_path / "images")
  path = tmp_path / "n.json"
  row = {"images": ["0.png", "1.png"], "sentence": "two shapes"}
  path.write_text(json.dumps([row]))
  context = make_context(model, str(path), tmp_path)
  context.settings.image_root = str(tmp_path / "images")
  assert run(model, context) == {}
  assert [*predictions(tmp_path)] == ["n.json:0"]
