"""Ranking by cosine and re-ranking by ITM, with bad rows and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from blip_jax.data import sources
from blip_jax.evaluators import ranking
from blip_jax.evaluators.scores import recall
from blip_jax.models import blip
from blip_jax.models import config as model_config
from blip_jax.tasks import base as tasks
from blip_jax.tasks import retrieval as retrieval_task
from tests import helpers
from tests.colour_task import (
  COLOURS,
  ColourImages,
  ColourTask,
  colour_of_text,
  colour_split,
  evaluate,
)


@pytest.mark.parametrize("captions", [1, 2])
@pytest.mark.parametrize("bad", [(), (2, 6)])
def test_unreadable_images_are_left_out(captions, bad):
  split = colour_split(ColourImages(bad=bad, captions=captions))
  ranker = ranking.Ranking(split, ColourTask())
  results = evaluate(ranker)
  assert results["txt_r1"] == results["img_r1"] == 100
  similarities = ranker.similarities({})
  assert similarities.sim.shape == (7 - len(bad), captions * (7 - len(bad)))
  assert set(similarities.rows) == set(range(7)) - set(bad)
  colour_of_row = [
    COLOURS.index(split.source[r]["caption"][0]) for r in similarities.rows
  ]
  for text, image in zip(
    similarities.text_rows, similarities.image_of, strict=True
  ):
    assert COLOURS[colour_of_row[image]] in ranker.texts[text]["caption"]


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def apply(model, params, *args, method):
  return model.apply({"params": params}, *args, method=method)


@pytest.mark.parametrize("k_test", [3, 100])
@pytest.mark.parametrize("batch_size", [1, 100])
def test_re_ranking_equals_scoring_every_pair(k_test, batch_size):
  """Every pair alone, and sorting: the original's evaluation, written out. Two
  captions per image, one unreadable image, and `k_test` above their number."""
  sizes = model_config.variant(
    "tiny",
    image_size=8,
    vocab_size=helpers.scenes_tokenizer().vocab_size,
    tokens=model_config.SpecialTokens(**helpers.scenes_tokenizer().special_ids),
    med=dict(depth=1),
    vit=dict(depth=1),
  )
  model = blip.Blip(sizes)
  task = retrieval_task.Retrieval(
    model, queue_size=4, ema_decay=0.9, alpha=0.4, alpha_ramp_steps=1
  )
  params = helpers.init("retrieval", sizes, jax.random.key(0))
  params = helpers.sharper(params, 3)
  split = colour_split(ColourImages(bad=(2,), captions=2), batch_size)
  ranker = ranking.Ranking(split, task, k_test)
  results = evaluate(ranker, params)

  call = functools.partial(apply, model, params)
  rows = [row for n, row in enumerate(split.source) if n != 2]
  texts = [caption for row in rows for caption in row["caption"]]
  ids, mask = helpers.scenes_tokenizer().encode(texts, 6)
  pixels = jnp.asarray(np.stack([row["image"] for row in rows]))
  embeds, image_feat = call(tasks.normalise(pixels), method="image_features")
  sim = np.asarray(image_feat @ call(ids, mask, method="text_feat").T)
  scores = sim.copy()
  for i, image_embeds in enumerate(np.asarray(embeds)):
    kv = call(image_embeds[None], method="image_kv")
    for j in range(len(texts)):
      logits = call(ids[j : j + 1], mask[j : j + 1], kv, method="match")
      scores[i, j] += np.asarray(logits)[0, 1]
  image_of = np.repeat(np.arange(len(rows)), 2)
  lists = []
  for similar, score in ((sim, scores), (sim.T, scores.T)):
    outside = np.argsort(-similar, axis=1)[:, k_test:]
    lists.append(score.copy())
    np.put_along_axis(lists[-1], outside, -100, axis=1)
  reranked = ranker.rerank(params, ranker.similarities(params))
  for both, expected in zip(reranked, lists, strict=True):
    np.testing.assert_allclose(both, expected, atol=2e-5)
  for name, value in recall.recall(*lists, image_of).items():
    assert results[name] == pytest.approx(value)
  for name, value in recall.recall(sim, sim.T, image_of).items():
    assert results[f"itc_{name}"] == pytest.approx(value)


def test_wrong_features_find_nothing():
  task = ColourTask(
    text_feat=lambda params, ids, mask: jnp.roll(
      colour_of_text(ids, mask), 1, axis=-1
    )
  )
  results = evaluate(ranking.Ranking(colour_split(ColourImages()), task))
  assert results["txt_r1"] == results["img_r1"] == 0


def test_an_image_counts_only_if_it_and_a_text_of_it_can_be_read():
  """Of seven images, one is broken and one has only an empty caption."""
  source = ColourImages(bad=(2,))
  source[5]["caption"] = ["..."]
  split = colour_split(source)
  ranker = ranking.Ranking(split, ColourTask())
  similarities = ranker.similarities({})
  assert similarities.rows.tolist() == [0, 1, 3, 4, 6]
  assert similarities.sim.shape == (5, 5)
  np.testing.assert_array_equal(similarities.image_of, np.arange(5))
  results = evaluate(ranker)
  assert results["txt_r1"] == results["img_r1"] == 100


def test_short_lists_by_hand():
  sim = np.array([[0.9, 0.1, 0.5], [0.8, 0.7, 0.6]], np.float32)
  lists = ranking.ShortLists.nearest(sim, 1)
  np.testing.assert_array_equal(lists.i2t, [[1, 0, 0], [1, 0, 0]])
  np.testing.assert_array_equal(lists.t2i, [[1, 0], [0, 1], [0, 1]])
  np.testing.assert_array_equal(lists.pairs, [[1, 0, 0], [1, 1, 1]])
  i2t, t2i = lists.ranked(sim)
  np.testing.assert_array_equal(i2t[0], sim[0] * [1, 0, 0] - [0, 100, 100])
  np.testing.assert_array_equal(t2i[1], [-100, np.float32(0.7)])
  everything = ranking.ShortLists.nearest(sim, 256)
  assert everything.i2t.all() and everything.t2i.all()


@pytest.mark.parametrize("with_id", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
def test_rows_of_one_image_are_one_image(interleaved, with_id):
  """The same numbers as with a list of captions. All but one image are found,
  which can happen only if no image counts twice."""
  listed = ColourImages(captions=2)
  listed[2]["caption"] = ["yellow", "a yellow square"]
  order = [(row, n) for row in range(7) for n in range(2)]
  if interleaved:
    order.sort(key=lambda both: both[::-1])
  flat = [
    {**listed[row], "caption": listed[row]["caption"][n], "id": f"{row}:{n}"}
    for row, n in order
  ]
  if with_id:
    for record, (row, n) in zip(flat, order, strict=True):
      # A number in one file, and text in another.
      record["image_id"] = [row, str(row)][n]
  expected, actual = (
    evaluate(ranking.Ranking(colour_split(source), ColourTask()))
    for source in (listed, flat)
  )
  assert actual == pytest.approx(expected)
  assert actual["txt_r1"] > 80


def test_paths_of_one_file_are_one_image(tmp_path):
  """./a.png and a.png."""
  listed = ColourImages(3, captions=2)
  flat = []
  for row, record in enumerate(listed):
    path = tmp_path / f"{row}.png"
    Image.fromarray(record["image"]).save(path)
    for folder, caption in zip(
      (f"{tmp_path}", f"{tmp_path}/./x/.."), record["caption"], strict=True
    ):
      flat.append(
        {"image": f"{folder}/{row}.png", "caption": caption, "id": caption}
      )
  (tmp_path / "x").mkdir()
  results = evaluate(ranking.Ranking(colour_split(flat), ColourTask()))
  assert results["txt_r1"] == results["img_r1"] == 100


def test_a_row_without_a_caption_does_not_hide_the_image():
  """Such a row is counted; the image keeps its other captions."""

  class Rows(list):
    def __getitem__(self, row):
      record = super().__getitem__(row)
      if row == 1:
        raise sources.BadRow(record["id"], "empty_caption", "nothing")
      return record

  images = ColourImages(3)
  split = colour_split(Rows([*images, *images]))
  ranker = ranking.Ranking(split, ColourTask())
  assert ranker.similarities({}).sim.shape == (3, 5)
  assert evaluate(ranker)["txt_r1"] == 100
  assert split.bad_samples.reasons["empty_caption"] == 2  # one for each pass
