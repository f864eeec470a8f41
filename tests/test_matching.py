"""Matching and embedding through `blip_jax.load(...)`."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from blip_jax.data import scenes, tokenizer
from blip_jax.inference import model as model_lib
from blip_jax.inference.abilities import base
from blip_jax.models import blip, card, config
from blip_jax.runtime import sharding
from tests import helpers

WORDS = ("a red circle", "a blue square, left of a green star", "two circles")


@pytest.fixture(scope="module")
def model():
  return helpers.make_model("itm")


@pytest.fixture(scope="module")
def images():
  return [scenes.Scenes("val")[i]["image"] for i in range(5)]


def normalised(model, image):
  mean, std = (
    np.array(x, np.float32) for x in (config.IMAGE_MEAN, config.IMAGE_STD)
  )
  return ((model.image(image)[None] / np.float32(255)) - mean) / std


def by_hand(model, image, text, legacy_cls=False):
  """Cosine, probability and rank score of one pair."""
  ids, mask = model.tokenizer.encode([text], 35)
  embeds, image_feat = model.apply(
    normalised(model, image), method="image_features"
  )
  kv = model.apply(embeds, method="image_kv")
  logits = model.apply(ids, mask, kv, method="match", legacy_cls=legacy_cls)
  text_feat = model.apply(ids, mask, method="text_feat")
  cosine = np.vdot(image_feat, text_feat)
  ((wrong, right),) = np.asarray(logits)
  return cosine, 1 / (1 + np.exp(wrong - right)), right + cosine


@pytest.mark.parametrize("batch_size", [2, 8])
def test_every_text_is_compared_with_every_image(model, images, batch_size):
  match = model.match(images, WORDS, batch_size=batch_size)
  assert all(field.shape == (5, 3) for field in match)
  for i, image in enumerate(images):
    for j, text in enumerate(WORDS):
      expected = by_hand(model, image, text)
      scores = [field[i, j] for field in match]
      np.testing.assert_allclose(scores, expected, atol=1e-5, err_msg=(i, j))
  assert (match.itm_prob > 0).all() and (match.itm_prob < 1).all()


def test_pairwise_scores_are_the_diagonal(model, images):
  everything = model.match(images[:3], WORDS)
  for batch_size in (2, 8):
    pairs = model.match(
      iter(images[:3]), WORDS, pairwise=True, batch_size=batch_size
    )
    for scores, matrix in zip(pairs, everything, strict=True):
      np.testing.assert_allclose(scores, np.diag(matrix), atol=1e-5)
  assert model.match(images[0], WORDS[0]).itm_prob.shape == (1, 1)


def test_a_few_images_make_a_small_batch(model, images):
  """And the last batch of many needs no program of its own."""
  program = model.matcher._scorer.image_features
  before = program._cache_size()
  for number, batch_size in ((1, 32), (3, 64), (4, 128)):
    model.embed_images(images[:number], batch_size=batch_size)
  assert program._cache_size() <= before + 2  # of 1 and 4
  many = model.embed_images(images, batch_size=4)
  assert program._cache_size() <= before + 2
  np.testing.assert_allclose(
    many, model.embed_images(images, batch_size=8), atol=1e-5
  )


def test_texts_are_cleaned_as_in_training_unless_legacy(model, images):
  """The demo only tokenises the text, and leaves [CLS] in front of it."""
  text, read = "A red circle!", "a red circle"
  found = model.match(images[0], text)
  expected = by_hand(model, images[0], read)
  np.testing.assert_allclose(np.ravel(found), expected, atol=1e-5)
  legacy = model.match(images[0], text, legacy_cls=True)
  expected = by_hand(model, images[0], text, legacy_cls=True)
  np.testing.assert_allclose(np.ravel(legacy), expected, atol=1e-5)
  assert abs(legacy.itm_prob - found.itm_prob) > 1e-4


def test_a_mesh_gives_the_same_scores(model, images):
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
  sharded = dataclasses.replace(
    model,
    mesh=mesh,
    params=jax.device_put(
      jax.device_get(model.params), sharding.state_shardings(model.params, mesh)
    ),
  )
  alone, on_mesh = (m.match(images, WORDS) for m in (model, sharded))
  for expected, scores in zip(alone, on_mesh, strict=True):
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_embeddings_are_unit_vectors_with_the_cosines_of_match(model, images):
  image_feat = model.embed_images(images)
  text_feat = model.embed_texts(WORDS)
  np.testing.assert_allclose(np.linalg.norm(image_feat, axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(text_feat, axis=1), 1, rtol=1e-5)
  found = model.match(images, WORDS, batch_size=2)
  np.testing.assert_allclose(
    image_feat @ text_feat.T, found.itc_cosine, atol=1e-5
  )
  one = model.embed_texts(WORDS[1], batch_size=1)
  np.testing.assert_allclose(one, text_feat[1:2], atol=1e-5)


def test_text_features_equal_the_originals():
  """`BLIP_Base` took each text alone; here they are a batch, with padding."""
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
  for i, name in enumerate(("text0", "text1")):
    (expected,) = np.asarray(golden[name])
    assert mask[i].sum() == len(expected)
    found = states[i, : len(expected)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_features_of_images_and_of_pairs(model, images, batch_size):
  pairs = model.features(images[:3], WORDS, batch_size=batch_size)
  alone = model.features(images[:3], batch_size=batch_size)
  assert alone.mask.all()
  for i, (image, text) in enumerate(zip(images, WORDS, strict=False)):
    embeds = model.apply(normalised(model, image), method="encode_image")
    np.testing.assert_allclose(alone.states[i][None], embeds, atol=1e-5)
    ids, mask = model.tokenizer.encode([text], 35)
    kv = model.apply(embeds, method="image_kv")
    (fused,) = np.asarray(model.apply(ids, mask, kv, method="fuse"))
    length = mask.sum()
    assert pairs.mask[i].sum() == length
    np.testing.assert_allclose(
      pairs.states[i, :length], fused[:length], atol=1e-5
    )


@pytest.mark.parametrize("batch_size", [2, 8])
def test_unreadable_images_are_left_out_on_request(model, images, batch_size):
  mixed = [b"?", images[0], images[1], b"", images[2]]
  readable = images[:3]
  options = dict(on_error="skip", batch_size=batch_size)
  vectors, kept = model.embed_images(iter(mixed), **options)
  assert kept.tolist() == [1, 2, 4]
  np.testing.assert_allclose(vectors, model.embed_images(readable), atol=1e-6)
  match, kept = model.match(mixed, WORDS, **options)
  assert kept.tolist() == [1, 2, 4]
  for found, expected in zip(match, model.match(readable, WORDS), strict=True):
    np.testing.assert_allclose(found, expected, atol=1e-5)
  texts = ["red", *WORDS[:2], "blue", WORDS[2]]
  match, kept = model.match(iter(mixed), texts, pairwise=True, **options)
  pairs = model.match(readable, WORDS, pairwise=True)
  assert kept.tolist() == [1, 2, 4]
  np.testing.assert_allclose(match.itm_prob, pairs.itm_prob, atol=1e-5)


def test_no_readable_image_gives_no_rows(model):
  vectors, kept = model.embed_images([b"?", b""], on_error="skip")
  assert vectors.shape == (0, 64) and kept.shape == (0,)
  match, kept = model.match([b"?"], WORDS, on_error="skip")
  assert [field.shape for field in match] == [(0, 3)] * 3
  match, kept = model.match([b"?"], ["red"], pairwise=True, on_error="skip")
  assert [field.shape for field in match] == [(0,)] * 3
  with pytest.raises(ValueError, match="expected at least one, found none"):
    model.embed_images(iter(()), on_error="skip")


def test_embedding_shows_its_progress_on_request(model, images, capsys):
  model.embed_images(images, progress=True)
  assert "5/5" in capsys.readouterr().err
  model.match(images, WORDS, progress=True)
  assert "5/5" in capsys.readouterr().err


def test_impossible_inputs_are_refused(model, images):
  few = images[:2]
  with pytest.raises(ValueError, match=r"pairs: .*found 2 and 3"):
    model.match(few, WORDS, pairwise=True)
  with pytest.raises(ValueError, match=r"pairs: .*found 2 and 3"):
    model.features(few, WORDS)
  for images, texts in (([], WORDS), (few, [])):
    with pytest.raises(ValueError, match="expected at least one"):
      model.match(images, texts)
  for empty in ("", "  ", "...!"):
    with pytest.raises(ValueError, match="text 1: empty_caption"):
      model.match(few, ["a circle", empty])
    with pytest.raises(ValueError, match="text 0: empty_caption"):
      model.embed_texts(empty)
  with pytest.raises(ValueError, match=r"image 1: missing.*nowhere"):
    model.embed_images([images[0], "nowhere.png"])
  with pytest.raises(ValueError, match="give images=, texts= or both"):
    model.features()


def test_damaged_weights_score_nothing(model, images):
  broken = lambda params: dataclasses.replace(model, params=params)
  nan = lambda tree: jax.tree.map(lambda x: np.full_like(x, np.nan), tree)
  damaged = broken(nan(model.params))
  for call in (
    lambda: damaged.embed_images(images),
    lambda: damaged.embed_texts(WORDS),
    lambda: damaged.features(images),
  ):
    with pytest.raises(ValueError, match="gives NaN; its weights are damaged"):
      call()
  head = nan(model.params["itm_head"])
  with pytest.raises(ValueError, match="gives NaN"):
    broken(model.params | {"itm_head": head}).match(images, WORDS)


def test_a_method_of_the_module_is_compiled_once(model):
  """For all arrays of the same shapes."""
  ids, mask = model.tokenizer.encode(["two red circles", "a star"], 35)
  one = model.apply(ids, mask, method="encode_text")
  programs = base._apply._cache_size()
  other = model.apply(ids[::-1], mask[::-1], method="encode_text")
  assert base._apply._cache_size() == programs
  np.testing.assert_allclose(np.asarray(other)[::-1], one, atol=1e-5)
  encode = functools.partial(model.module.apply, method="encode_text")
  expected = jax.jit(encode)({"params": model.params}, ids, mask)
  np.testing.assert_allclose(one, expected, atol=1e-5)


def test_models_without_itm_name_models_that_have_it(images):
  captioner = helpers.make_model("caption")
  for call in (
    lambda: captioner.match(images, WORDS),
    lambda: captioner.embed_images(images),
    lambda: captioner.embed_texts(WORDS),
    lambda: captioner.features(texts=WORDS),
  ):
    with pytest.raises(ValueError, match=r"'caption'.*model_base_retrieval"):
      call()
  assert captioner.features(images=images).states.shape[:2] == (5, 5)
  nlvr = helpers.make_model("nlvr")
  with pytest.raises(ValueError, match=r"'nlvr', which cannot encode"):
    nlvr.features(images=images)
  wordless = helpers.make_model("itm", tokenizer=None)
  with pytest.raises(ValueError, match="no vocabulary"):
    wordless.match(images, WORDS)
