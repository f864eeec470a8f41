"""Evaluators on a task whose answers are known, with padding and bad rows."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.data import (
  examples,
  rejects,
  scenes,
  tokenizer,
  transforms,
)
from blip_jax.evaluators import (
  base,
  held_out_loss,
  itm_accuracy,
  ranking,
  samples,
)
from blip_jax.evaluators import captions as captions_lib
from blip_jax.evaluators.scores import recall
from blip_jax.models import blip, decoding, generation
from blip_jax.models import config as model_config
from blip_jax.runtime import sharding, train_state
from blip_jax.tasks import base as tasks
from blip_jax.tasks import retrieval as retrieval_task
from tests import helpers

COLOURS = ("red", "green", "blue", "yellow", "black", "pink", "cyan")
TEXTS = tokenizer.Tokenizer.load(scenes.vocab_dir())


class Pictures(list):
  """Plain pictures of seven colours; the caption is the colour."""

  def __init__(self, number=7, bad=(), captions=1):
    for i in range(number):
      image = np.full((8, 8, 3), scenes.COLOURS[COLOURS[i]], np.uint8)
      caption = [COLOURS[i], f"a {COLOURS[i]} square"][:captions]
      self.append(
        {
          "image": b"" if i in bad else image,
          "caption": caption,
          "id": f"pictures:{i}",
        }
      )


def make_split(source, batch_size=4, **kwargs):
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
  example = examples.PairExample(
    TEXTS, transforms.EvalImage(8), max_words=5, max_length=6
  )
  bad = rejects.BadSamples(max_fraction=0.5, **kwargs)
  return base.Split(source, example, batch_size, mesh, bad)


def colour_ids():
  ids, _ = TEXTS.encode(list(COLOURS), 3)
  return jnp.asarray(ids[:, 1])


PALETTE = jnp.array([scenes.COLOURS[c] for c in COLOURS], jnp.float32)


def which(image):
  """One-hot of the colour that a picture has."""
  distance = jnp.abs(image[:, :1, 0].astype(jnp.float32) - PALETTE[None])
  return jax.nn.one_hot(distance.sum(-1).argmin(-1), len(COLOURS))


def named(ids):
  """One-hot of the colour that a text names."""
  found = (ids[:, :, None] == colour_ids()[None, None]).any(1)
  return found.astype(jnp.float32)


def match(params, ids, mask, image_kv, legacy_cls=False):
  both = jnp.repeat(image_kv, len(ids) // len(image_kv), 0) * named(ids)
  return jnp.stack([0.5 * jnp.ones(len(ids)), both.sum(-1)], axis=-1)


def caption(params, image, prompt, settings, room):
  ids = colour_ids()[which(image).argmax(-1)]
  texts = jnp.zeros((len(ids), 1, room), jnp.int32)
  texts = texts.at[:, 0, : len(prompt)].set(prompt[None])
  texts = texts.at[:, 0, len(prompt)].set(ids)
  return generation.Generated(texts, jnp.zeros(texts.shape), jnp.zeros(1))


class Knows(helpers.StubTask):
  """Knows its colours."""

  # As much of a model as evaluators look at.
  model = types.SimpleNamespace(
    config=model_config.variant(
      "tiny",
      image_size=8,
      vocab_size=TEXTS.vocab_size,
      tokens=model_config.SpecialTokens(**TEXTS.special_ids),
    )
  )

  predict_fns = types.MappingProxyType(
    {
      "image_features": lambda params, image: (which(image), which(image)),
      "text_feat": lambda params, ids, mask: named(ids),
      "image_kv": lambda params, image_embeds: image_embeds,
      "match": match,
      "caption": caption,
    }
  )

  def loss(self, params, momentum, batch, *, rng, step, train=True):
    assert not train
    loss = batch["image"].astype(jnp.float32).mean()
    return loss, (momentum, {"loss": loss, "temp": loss})


STATE = train_state.TrainState(
  step=np.int32(5), params={}, opt_state=None, momentum=None
)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_rows_come_once_and_in_order(batch_size):
  split = make_split(Pictures(), batch_size)
  program = jax.jit(lambda batch: batch["image"][:, 0, 0])
  rows, valid = split.map(program)
  np.testing.assert_array_equal(rows, PALETTE)
  assert valid.all() and len(valid) == 7


@pytest.mark.parametrize("captions", [1, 2])
@pytest.mark.parametrize("bad", [(), (2, 6)])
def test_retrieval_leaves_out_what_cannot_be_read(captions, bad):
  split = make_split(Pictures(bad=bad, captions=captions))
  ranker = ranking.Ranking(split, Knows())
  results = dict(ranker.run(STATE))
  assert results["txt_r1"] == results["img_r1"] == 100
  seen = ranker.similarities({})
  assert seen.sim.shape == (7 - len(bad), captions * (7 - len(bad)))
  assert set(seen.rows) == set(range(7)) - set(bad)
  of_row = [COLOURS.index(split.source[r]["caption"][0]) for r in seen.rows]
  for text, image in zip(seen.text_rows, seen.image_of, strict=True):
    assert COLOURS[of_row[image]] in ranker.texts[text]["caption"]


@pytest.mark.parametrize("k_test", [3, 100])
@pytest.mark.parametrize("batch_size", [1, 100])
def test_ranking_anew_equals_the_slow_way(k_test, batch_size):
  """Every pair by itself, and sorting: the original's evaluation, written out.
  Two captions a picture, a picture that cannot be read, more candidates asked
  for than there are."""
  sizes = model_config.variant(
    "tiny",
    image_size=8,
    vocab_size=TEXTS.vocab_size,
    tokens=model_config.SpecialTokens(**TEXTS.special_ids),
    med=dict(depth=1),
    vit=dict(depth=1),
  )
  model = blip.Blip(sizes)
  task = retrieval_task.Retrieval(
    model, queue_size=4, ema_decay=0.9, alpha=0.4, alpha_ramp_steps=1
  )
  params = task.init(jax.random.key(0))
  params = jax.tree.map(lambda x: 3 * x if x.ndim == 2 else x, params)
  split = make_split(Pictures(bad=(2,), captions=2), batch_size)
  ranker = ranking.Ranking(split, task, k_test)
  results = dict(ranker.run(STATE.replace(params=params)))

  apply = jax.jit(model.apply, static_argnames="method")
  call = functools.partial(apply, {"params": params})
  rows = [row for n, row in enumerate(split.source) if n != 2]
  texts = [caption for row in rows for caption in row["caption"]]
  ids, mask = map(jnp.asarray, TEXTS.encode(texts, 6))
  pixels = jnp.stack([jnp.asarray(row["image"]) for row in rows])
  embeds, image_feat = call(tasks.normalise(pixels), method="image_features")
  sim = np.asarray(image_feat @ call(ids, mask, method="text_feat").T)
  scores = sim.copy()
  for i, own in enumerate(embeds):
    kv = call(own[None], method="image_kv")
    for j in range(len(texts)):
      logits = call(ids[j : j + 1], mask[j : j + 1], kv, method="match")
      scores[i, j] += logits[0, 1]
  image_of = np.repeat(np.arange(len(rows)), 2)
  lists = []
  for similar, score in ((sim, scores), (sim.T, scores.T)):
    outside = np.argsort(-similar, axis=1)[:, k_test:]
    lists.append(score.copy())
    np.put_along_axis(lists[-1], outside, -100, axis=1)
  found = ranker.rerank(params, ranker.similarities(params))
  for ours, expected in zip(found, lists, strict=True):
    np.testing.assert_allclose(ours, expected, atol=2e-5)
  for name, value in recall.recall(*lists, image_of).items():
    assert results[name] == pytest.approx(value)
  for name, value in recall.recall(sim, sim.T, image_of).items():
    assert results[f"itc_{name}"] == pytest.approx(value)


def test_retrieval_can_be_wrong():
  task = Knows()
  task.predict_fns = {
    **task.predict_fns,
    "text_feat": lambda params, ids, mask: jnp.roll(named(ids), 1, axis=-1),
  }
  results = dict(ranking.Ranking(make_split(Pictures()), task).run(STATE))
  assert results["txt_r1"] == results["img_r1"] == 0


@pytest.mark.parametrize("batch_size", [4, 8, 100])
def test_matching_counts_no_padding(batch_size):
  split = make_split(Pictures(bad=(3,)), batch_size)
  assert (
    dict(itm_accuracy.ItmAccuracy(split, Knows()).run(STATE))["itm_acc"] == 100
  )


def test_matching_of_one_text_is_left_out(caplog):
  split = make_split(Pictures(1) + Pictures(1))
  assert dict(itm_accuracy.ItmAccuracy(split, Knows()).run(STATE)) == {}
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
def test_partners_are_valid_and_others(valid, partner):
  found = itm_accuracy._half_a_batch_away(jnp.array(valid, bool))
  for row, expected in enumerate(partner):
    assert expected is None or found[row] == expected


@pytest.mark.parametrize("answer, accuracy", [(1.0, 50.0), (0.0, 50.0)])
def test_matching_of_a_constant_is_chance(answer, accuracy):
  task = Knows()
  task.predict_fns = {
    **task.predict_fns,
    "match": lambda params, ids, mask, kv, legacy_cls=False: jnp.stack(
      [jnp.full(len(ids), 0.5), jnp.full(len(ids), answer)], axis=-1
    ),
  }
  split = make_split(Pictures(), 8)
  assert (
    dict(itm_accuracy.ItmAccuracy(split, task).run(STATE))["itm_acc"]
    == accuracy
  )


def test_losses_average_whole_batches():
  """Seven rows make no whole batch of eight, and sixteen make two."""
  assert (
    dict(held_out_loss.HeldOutLoss(make_split(Pictures()), Knows()).run(STATE))
    == {}
  )
  two = Pictures() + Pictures() + Pictures(2)
  result = dict(held_out_loss.HeldOutLoss(make_split(two), Knows()).run(STATE))
  images = np.stack([row["image"] for row in two]).astype(np.float64)
  assert result == {"loss": pytest.approx(images.mean(), rel=1e-5)}


def caption_of(split, tmp_path, references=None):
  settings = decoding.Decoding(6, 0, num_beams=1)
  path = tmp_path / "captions.json"
  evaluator = captions_lib.Captions(
    split, Knows(), settings, references, path, tmp_path / "sheet.png", 2
  )
  return dict(evaluator.run(STATE)), json.loads(path.read_text())


def test_captions_are_written_and_scored(tmp_path):
  found, rows = caption_of(make_split(Pictures(bad=(0,))), tmp_path)
  assert rows == [
    {"image_id": f"pictures:{i}", "caption": COLOURS[i]} for i in range(1, 7)
  ]
  assert found["caption_exact"] == 100 and found["Bleu_1"] == pytest.approx(1)
  assert (tmp_path / "sheet.png").exists()
  # What other people said counts instead, if it is given.
  others = {f"pictures:{i}": ["nothing"] for i in range(7)}
  found, _ = caption_of(make_split(Pictures()), tmp_path, others)
  assert found["caption_exact"] == 100 and found["Bleu_1"] < 1e-6


def test_a_picture_is_in_the_results_once(tmp_path):
  """Under the number that its annotation has, or its file's name."""

  class Rows(Pictures):
    def __getitem__(self, row):
      record = {**super().__getitem__(row), "image_id": row // 2}
      if row == 6:
        del record["image_id"]
      return record

  _, rows = caption_of(make_split(Rows()), tmp_path)
  assert [row["image_id"] for row in rows] == [0, 1, 2, "pictures:6"]


def test_pictures_without_captions_are_written_only(tmp_path):
  class Rows(Pictures):
    def __getitem__(self, row):
      record = dict(super().__getitem__(row))
      del record["caption"]
      return record

  found, rows = caption_of(make_split(Rows()), tmp_path)
  assert not found and len(rows) == 7


def test_samples(tmp_path, capsys):
  split = make_split(Pictures(bad=(0,)))
  ranker = ranking.Ranking(split, Knows())
  path = tmp_path / "samples.png"
  sheet = samples.Samples(split, Knows(), ranker, 3, path)
  assert dict(sheet.run(STATE)) == {"caption_exact": 100.0}
  assert path.exists()
  told = capsys.readouterr().out
  assert "true:    green" in told and "written: green" in told
  assert "red" not in told
