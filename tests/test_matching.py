"""Matching and embedding through the user's door."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from blip_jax.data import scenes, tokenizer
from blip_jax.inference import model as model_lib
from blip_jax.models import blip, card, config
from blip_jax.runtime import sharding
from tests import helpers

WORDS = ("a red circle", "a blue square, left of a green star", "two circles")


@pytest.fixture(scope="module")
def model():
  return helpers.make_model("itm")


@pytest.fixture(scope="module")
def pictures():
  return [scenes.Scenes("val")[i]["image"] for i in range(5)]


def normalised(model, picture):
  mean, std = (
    np.array(x, np.float32) for x in (config.IMAGE_MEAN, config.IMAGE_STD)
  )
  return ((model.image(picture)[None] / np.float32(255)) - mean) / std


def by_hand(model, picture, text, legacy_cls=False):
  """Of one pair: cosine, probability and rank score."""
  ids, mask = model.tokenizer.encode([text], 35)
  embeds, image_feat = model.apply(
    normalised(model, picture), method="image_features"
  )
  kv = model.apply(embeds, method="image_kv")
  (logits,) = model.apply(ids, mask, kv, method="match", legacy_cls=legacy_cls)
  cosine = image_feat[0] @ model.apply(ids, mask, method="text_feat")[0]
  return cosine, jax.nn.softmax(logits)[1], logits[1] + cosine


@pytest.mark.parametrize("batch_size", [2, 8])
def test_all_with_all(model, pictures, batch_size):
  found = model.match(pictures, WORDS, batch_size=batch_size)
  assert all(field.shape == (5, 3) for field in found)
  for i, picture in enumerate(pictures):
    for j, text in enumerate(WORDS):
      expected = by_hand(model, picture, text)
      ours = [field[i, j] for field in found]
      np.testing.assert_allclose(ours, expected, atol=1e-5, err_msg=(i, j))
  assert (found.itm_prob > 0).all() and (found.itm_prob < 1).all()


def test_pairs_are_the_diagonal(model, pictures):
  everything = model.match(pictures[:3], WORDS)
  for batch_size in (2, 8):
    found = model.match(
      iter(pictures[:3]), WORDS, pairwise=True, batch_size=batch_size
    )
    for ours, whole in zip(found, everything, strict=True):
      np.testing.assert_allclose(ours, np.diag(whole), atol=1e-5)
  assert model.match(pictures[0], WORDS[0]).itm_prob.shape == (1, 1)


def test_a_few_pictures_are_a_small_batch(model, pictures):
  """And the last of many is no program of its own."""
  program = model.matcher._scorer.image_features
  before = program._cache_size()
  for number, batch_size in ((1, 32), (3, 64), (4, 128)):
    model.embed_images(pictures[:number], batch_size=batch_size)
  assert program._cache_size() <= before + 2  # of 1 and 4
  many = model.embed_images(pictures, batch_size=4)
  assert program._cache_size() <= before + 2
  np.testing.assert_allclose(
    many, model.embed_images(pictures, batch_size=8), atol=1e-5
  )


def test_a_text_is_read_as_in_training_and_as_it_is_for_legacy(model, pictures):
  """The demo tokenises the text alone, and leaves [CLS] before it."""
  text, read = "A red circle!", "a red circle"
  found = model.match(pictures[0], text)
  expected = by_hand(model, pictures[0], read)
  np.testing.assert_allclose(np.ravel(found), expected, atol=1e-5)
  legacy = model.match(pictures[0], text, legacy_cls=True)
  expected = by_hand(model, pictures[0], text, legacy_cls=True)
  np.testing.assert_allclose(np.ravel(legacy), expected, atol=1e-5)
  assert abs(legacy.itm_prob - found.itm_prob) > 1e-4


def test_a_mesh_matches_the_same(model, pictures):
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
  sharded = dataclasses.replace(
    model,
    mesh=mesh,
    params=jax.device_put(
      model.params, sharding.state_shardings(model.params, mesh)
    ),
  )
  alone, spread = (m.match(pictures, WORDS) for m in (model, sharded))
  for one, other in zip(alone, spread, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_embeddings_are_unit_vectors_that_match_compares(model, pictures):
  images, texts = model.embed_images(pictures), model.embed_texts(WORDS)
  np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, rtol=1e-5)
  found = model.match(pictures, WORDS, batch_size=2)
  np.testing.assert_allclose(images @ texts.T, found.itc_cosine, atol=1e-5)
  one = model.embed_texts(WORDS[1], batch_size=1)
  np.testing.assert_allclose(one, texts[1:2], atol=1e-5)


def test_features_of_texts_are_the_original_extractors():
  """`BLIP_Base` took each alone; here they are a batch, with padding."""
  golden = helpers.arrays("blip_base")
  manifest = json.loads((helpers.GOLDEN / "manifest.json").read_text())
  (case,) = (c for c in manifest["cases"] if c["name"] == "blip_base")
  model = model_lib.Model(
    card.Card("feature", helpers.BLIP),
    blip.Blip(helpers.BLIP),
    helpers.params("blip_base"),
    tokenizer.Tokenizer.load(helpers.GOLDEN / "tokenizer" / "tiny"),
    sharding.one_device(),
  )
  states, mask = model.features(texts=case["facts"]["captions"]["value"])
  for i, expected in enumerate((golden["text0"][0], golden["text1"][0])):
    assert mask[i].sum() == len(expected)
    found = states[i, : len(expected)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_features_of_pictures_and_of_both(model, pictures, batch_size):
  found = model.features(pictures[:3], WORDS, batch_size=batch_size)
  images = model.features(pictures[:3], batch_size=batch_size)
  assert images.mask.all()
  for i, (picture, text) in enumerate(zip(pictures, WORDS, strict=False)):
    embeds = model.apply(normalised(model, picture), method="encode_image")
    np.testing.assert_allclose(images.states[i], embeds[0], atol=1e-5)
    ids, mask = model.tokenizer.encode([text], 35)
    kv = model.apply(embeds, method="image_kv")
    fused = model.apply(ids, mask, kv, method="fuse")
    length = mask.sum()
    assert found.mask[i].sum() == length
    np.testing.assert_allclose(
      found.states[i, :length], fused[0, :length], atol=1e-5
    )


def test_what_cannot_be(model, pictures):
  few = pictures[:2]
  with pytest.raises(ValueError, match=r"pairs: .*found 2 and 3"):
    model.match(few, WORDS, pairwise=True)
  with pytest.raises(ValueError, match=r"pairs: .*found 2 and 3"):
    model.features(few, WORDS)
  for images, texts in (([], WORDS), (few, [])):
    with pytest.raises(ValueError, match="there are none"):
      model.match(images, texts)
  for empty in ("", "  ", "...!"):
    with pytest.raises(ValueError, match="text 1: empty_caption"):
      model.match(few, ["a circle", empty])
    with pytest.raises(ValueError, match="text 0: empty_caption"):
      model.embed_texts(empty)
  with pytest.raises(ValueError, match=r"picture 1: missing.*nowhere"):
    model.embed_images([pictures[0], "nowhere.png"])
  with pytest.raises(ValueError, match="give images=, texts= or both"):
    model.features()


def test_weights_that_are_damaged_score_nothing(model, pictures):
  broken = lambda params: dataclasses.replace(model, params=params)
  nowhere = broken(jax.tree.map(lambda x: x * np.nan, model.params))
  for ask in (
    lambda: nowhere.embed_images(pictures),
    lambda: nowhere.embed_texts(WORDS),
    lambda: nowhere.features(pictures),
  ):
    with pytest.raises(ValueError, match="gives NaN; its weights are damaged"):
      ask()
  head = jax.tree.map(lambda x: x * np.nan, model.params["itm_head"])
  with pytest.raises(ValueError, match="gives NaN"):
    broken(model.params | {"itm_head": head}).match(pictures, WORDS)


def test_models_that_cannot_match_say_which_can(pictures):
  captioner = helpers.make_model("caption")
  for ask in (
    lambda: captioner.match(pictures, WORDS),
    lambda: captioner.embed_images(pictures),
    lambda: captioner.embed_texts(WORDS),
    lambda: captioner.features(texts=WORDS),
  ):
    with pytest.raises(ValueError, match=r"'caption'.*model_base_retrieval"):
      ask()
  assert captioner.features(images=pictures).states.shape[:2] == (5, 5)
  wordless = helpers.make_model("itm", tokenizer=None)
  with pytest.raises(ValueError, match="no vocabulary"):
    wordless.match(pictures, WORDS)
