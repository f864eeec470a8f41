"""Statements about two images from Python: in order, with probabilities."""

import functools

import numpy as np
import pytest
from PIL import Image

from blip_jax.runtime import sharding
from tests import helpers

STATED = [
  "the left image has a red circle",
  "Both images have a shape!",
  "there are three shapes in the two images",
]


@pytest.fixture(scope="module")
def model():
  return helpers.make_model("nlvr")


@functools.cache
def make_pairs(number=3):
  """Arrays in the model's size."""
  rng = np.random.default_rng(number)
  pixels = rng.integers(0, 256, (number, 2, 16, 16, 3), np.uint8)
  return [(left, right) for left, right in pixels]


def same(one, two):
  assert [x.label for x in one] == [x.label for x in two]
  probs = [[x.prob for x in results] for results in (one, two)]
  np.testing.assert_allclose(*probs, rtol=1e-4)


def test_a_result_is_what_the_module_says_of_its_pair(model):
  found = model.compare(make_pairs(), STATED)
  assert len(found) == 3
  mean = np.array([0.48145466, 0.4578275, 0.40821073])
  std = np.array([0.26862954, 0.26130258, 0.27577711])
  pixels = (np.array(make_pairs()).swapaxes(0, 1) / 255 - mean) / std
  pixels = pixels.reshape(6, 16, 16, 3).astype(np.float32)
  cleaned = [text.lower().removesuffix("!") for text in STATED]
  tokens = helpers.scenes_tokenizer().encode(cleaned, 16)
  false, true = np.asarray(model.apply(pixels, *tokens)).T
  for n, one in enumerate(found):
    prob = np.exp(true[n]) / (np.exp(true[n]) + np.exp(false[n]))
    assert one.prob == pytest.approx(prob, rel=1e-4)
    assert one.label is bool(prob > 0.5)


def test_the_order_of_two_images_counts(model):
  swapped = [pair[::-1] for pair in make_pairs()]
  one, two = (model.compare(pairs, STATED) for pairs in (make_pairs(), swapped))
  assert all(a.prob != b.prob for a, b in zip(one, two, strict=True))


def test_results_do_not_depend_on_the_batch(model):
  together = model.compare(make_pairs(), STATED)
  streamed = model.compare_stream(
    iter(make_pairs()), iter(STATED), batch_size=2
  )
  same(together, [*streamed])


def test_one_pair_and_one_statement_in_every_form(model, tmp_path):
  left, right = make_pairs()[0]
  files = [tmp_path / "left.png", tmp_path / "right.png"]
  for path, pixels in zip(files, (left, right), strict=True):
    Image.fromarray(pixels).save(path)
  expected = model.compare([(left, right)], STATED[:1])
  for pair in (
    (left, right),
    [left, right],
    np.stack([left, right]),
    tuple(map(str, files)),
    [path.read_bytes() for path in files],
    [[Image.open(path) for path in files]],
    np.stack([left, right])[None],
  ):
    same(model.compare(pair, STATED[0]), expected)


def test_a_statement_about_all_pairs_and_a_pair_with_many(model):
  pairs = make_pairs()
  same(model.compare(pairs, STATED[0]), model.compare(pairs, [STATED[0]] * 3))
  same(model.compare(pairs[0], STATED), model.compare([pairs[0]] * 3, STATED))
  same(model.compare(pairs[0], iter(STATED)), model.compare(pairs[0], STATED))


def test_two_pairs_are_not_one(model):
  pairs = make_pairs()[:2]
  for given in (pairs, tuple(pairs), np.array(pairs)):
    assert len(model.compare(given, STATED[:2])) == 2


def test_a_pair_with_a_missing_image_is_skipped(model, caplog):
  pairs = make_pairs()
  broken = [pairs[0], (pairs[1][0], "nowhere.png"), pairs[2]]
  found = model.compare(broken, STATED, on_error="skip")
  assert found[1] is None
  same([found[0], found[2]], model.compare(pairs, STATED)[::2])
  assert "1 of 3 pairs cannot be read and were skipped" in caplog.text
  with pytest.raises(ValueError, match=r"pair 1: .*image 1.*nowhere\.png"):
    model.compare(broken, STATED)


@pytest.mark.parametrize("pair", [("a.png",), "a.png", ("a", "b", "c")])
def test_what_is_no_pair(model, pair):
  with pytest.raises(ValueError, match="pair 1: not_a_pair: expected two"):
    model.compare([make_pairs()[0], pair], STATED[:2])


@pytest.mark.parametrize(
  "statements, message",
  [
    (["a", "b"], "statement for each pair, .*found 3 pairs and 2 statements"),
    (iter(["a"]), "there are fewer statements than pairs"),
    ("...", r"statement '\.\.\.': empty: expected words"),
  ],
)
def test_mistakes(model, statements, message):
  with pytest.raises(ValueError, match=message):
    model.compare(make_pairs(), statements)


def test_long_statements_are_cut_and_reported(model, caplog):
  words = " ".join(["red circle"] * 20)
  (whole,) = model.compare(make_pairs()[0], words)
  assert not caplog.text
  (cut,) = model.compare(make_pairs()[0], f"{words} and more")
  assert "1 statements have more than 40 words" in caplog.text
  same([whole], [cut])


def test_a_model_that_cannot_compare_says_which_can():
  with pytest.raises(ValueError, match=r"'vqa', which cannot .*'model_base_n"):
    helpers.make_model("vqa").compare(make_pairs(), "a")


def test_a_model_without_a_vocabulary_says_so():
  with pytest.raises(ValueError, match=r"no vocabulary.*tokenizer="):
    helpers.make_model("nlvr", tokenizer=None).compare(make_pairs(), "a")


def test_devices_share_a_batch(model):
  parallel = helpers.make_model("nlvr", mesh=sharding.as_mesh(2))
  same(
    parallel.compare(make_pairs(), STATED), model.compare(make_pairs(), STATED)
  )
