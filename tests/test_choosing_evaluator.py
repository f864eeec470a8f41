"""Dialogs of a split: the file of ranks, MRR, recall, NDCG."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax import defaults
from blip_jax.data import datasets, rejects, transforms
from blip_jax.evaluators import base, choosing
from blip_jax.runtime import sharding, train_state
from blip_jax.tasks import base as task_base
from blip_jax.tasks import dialog
from tests import helpers


@pytest.fixture(scope="module")
def model():
  return helpers.make_model("dialog")


def make_context(model, source, tmp_path, image_root="", mesh=None):
  config = dialog.defaults()
  config.evals.batch_size = 4
  config.data.max_length, config.dialog.context_length = 64, 12
  settings = defaults.split(source)
  settings.image_root = image_root
  return base.Context(
    "val",
    settings,
    config,
    dialog.Dialog(model.module),
    dialog.example(
      config, helpers.scenes_tokenizer(), transforms.EvalImage(16)
    ),
    mesh or sharding.one_device(),
    rejects.BadSamples(max_fraction=0.9),
    str(tmp_path),
  )


def run(model, context):
  state = train_state.TrainState(0, model.params, None, None)
  (evaluator,) = choosing.build(context)
  return dict(evaluator.run(state))


def written(tmp_path):
  return json.loads((tmp_path / "val_ranks.json").read_text())


def score(model, record, number, answer):
  """Of one candidate in round `number`, by the methods of the module."""
  tokenizer = helpers.scenes_tokenizer()
  rounds = record["dialog"][: number + 1]
  # [SEP] is a word of the tokenizer.
  said = [f"{x.question} [SEP] {x.answer} [SEP]" for x in rounds[:-1]]
  text = " ".join([*said, f"{rounds[-1].question} [SEP] {answer}"])
  pixels = transforms.EvalImage(16)(record["image"])[None]
  states = model.apply(
    task_base.normalise(jnp.asarray(pixels)), method="encode_image"
  )
  context = tokenizer.encode([record["context"]], 12)
  length = int(context[1].sum())
  read = model.apply(*(x[:, :length] for x in context), method="encode_text")
  states = np.concatenate([states, read], axis=1)
  kv = model.apply(states, method="image_kv")
  wrong, right = model.apply(*tokenizer.encode([text], 64), kv, method="match")[
    0
  ]
  return float(right - wrong)


def test_a_split_is_ranked_and_scored(model, tmp_path):
  """Five dialogs in batches of four; padding is no dialog."""
  split = "scenes:val?num=5&size=16"
  results = run(model, make_context(model, split, tmp_path))
  source = datasets.open_dialogs(split)
  rows = written(tmp_path)
  assert [(row["image_id"], row["round_id"]) for row in rows] == [
    (image, number) for image in range(5) for number in range(1, 5)
  ]
  assert all(sorted(row["ranks"]) == [*range(1, 11)] for row in rows)
  record = source[3]
  for number in (0, 3):
    each = record["dialog"][number]
    scores = [score(model, record, number, x) for x in each.candidates]
    order = np.argsort(-np.array(scores))
    assert np.argsort(rows[12 + number]["ranks"]).tolist() == order.tolist()
  right = np.array(
    [
      rows[4 * n + number]["ranks"][each.right]
      for n in range(5)
      for number, each in enumerate(source[n]["dialog"])
    ]
  )
  assert results == {
    "mrr": pytest.approx(100 * (1 / right).mean()),
    "r1": pytest.approx(100 * (right == 1).mean()),
    "r5": pytest.approx(100 * (right <= 5).mean()),
    "r10": 100,
    "mean_rank": pytest.approx(right.mean()),
    # One candidate is relevant, and so only the first rank counts.
    "ndcg": pytest.approx(100 * (right == 1).mean()),
  }


def test_devices_share_a_batch(model, tmp_path):
  split = "scenes:val?num=5&size=16"
  one = run(model, make_context(model, split, tmp_path))
  mesh = sharding.as_mesh(2)
  parallel = helpers.make_model("dialog", mesh=mesh)
  two = run(parallel, make_context(parallel, split, tmp_path, mesh=mesh))
  assert two == pytest.approx(one)


ROUNDS = [
  {"question": "is it red?", "answer": "no"},
  {"question": "where?", "answer_options": ["left", "right", "top"]},
]


def test_secret_answers_broken_images_and_repeated_ids(model, tmp_path, caplog):
  """As in VisDial's test split; nothing can be scored."""
  helpers.write_images(tmp_path / "images")
  names = ["0.png", "1.png", "2b.jpg", "nowhere.png", "1.png", None]
  ids = [7, 8, 9, 10, 8, 11]
  rows = [
    {"image": name, "image_id": id, "caption": "a heart", "dialog": ROUNDS}
    for name, id in zip(names, ids, strict=True)
  ]
  # Of dialogs with one id, the first counts; its candidates are three.
  rows[4]["dialog"] = [ROUNDS[0], {**ROUNDS[1], "answer_options": ["a", "b"]}]
  path = tmp_path / "d.json"
  path.write_text(json.dumps(rows))
  context = make_context(model, str(path), tmp_path, str(tmp_path / "images"))
  assert run(model, context) == {}
  found = written(tmp_path)
  assert [(row["image_id"], row["round_id"]) for row in found] == [
    (7, 2),
    (8, 2),
  ]
  assert all(sorted(row["ranks"]) == [1, 2, 3] for row in found)
  assert "1 rows repeat the id of a dialog" in caplog.text
  assert context.bad_samples.reasons.total() == 3


def test_a_dialog_that_is_too_large_costs_itself_only(model, tmp_path):
  helpers.write_images(tmp_path / "images")
  many = {**ROUNDS[1], "answer_options": [f"{n} red" for n in range(1001)]}
  dialogs = [[ROUNDS[1]], [many], [ROUNDS[1]] * 51, [ROUNDS[1]] * 2]
  rows = [
    {"image": "0.png", "image_id": n, "dialog": dialog}
    for n, dialog in enumerate(dialogs)
  ]
  path = tmp_path / "d.json"
  path.write_text(json.dumps(rows))
  context = make_context(model, str(path), tmp_path, str(tmp_path / "images"))
  run(model, context)
  assert [row["image_id"] for row in written(tmp_path)] == [0, 3, 3]
  assert context.bad_samples.reasons == {"dialog_too_large": 2}


def test_ndcg_is_of_the_rounds_that_have_relevance(model, tmp_path, caplog):
  helpers.write_images(tmp_path / "images")
  dense = [{**ROUNDS[1], "relevance": [0, 0, 0], "gt_index": 0}]
  rows = [
    {"image": "0.png", "dialog": [{**ROUNDS[1], "relevance": [1, 0.5, 0.2]}]},
    {"image": "1.png", "dialog": dense},
  ]
  path = tmp_path / "d.json"
  path.write_text(json.dumps(rows))
  context = make_context(model, str(path), tmp_path, str(tmp_path / "images"))
  results = run(model, context)
  ranks = written(tmp_path)[0]["ranks"]
  gains = np.array([1, 0.5, 0.2])
  discounts = 1 / np.log2(np.array([2, 3, 4]))
  expected = (gains[np.argsort(ranks)] * discounts).sum()
  assert results["ndcg"] == pytest.approx(
    100 * expected / (gains * discounts).sum()
  )
  assert "1 of 2 rounds have no relevant candidate" in caplog.text
  assert results["mrr"] == pytest.approx(100 / written(tmp_path)[1]["ranks"][0])
