"""Answers in dialogs from Python: in order, with probabilities."""

import copy
import dataclasses
import functools

import numpy as np
import pytest
from PIL import Image

import blip_jax
from blip_jax.inference import choosing
from blip_jax.runtime import sharding
from tests import helpers


@pytest.fixture(scope="module")
def model():
  return helpers.make_model("dialog")


@functools.cache
def make_dialogs():
  """Three, with arrays in the model's size and 3, 1 and 5 candidates."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (3, 16, 16, 3), np.uint8)
  return (
    blip_jax.Dialog(
      images[0],
      "where is it?",
      ["left", "right", "top"],
      [("is it red?", "no"), ("what colour is it?", "blue")],
      "a picture of a heart",
    ),
    blip_jax.Dialog(images[1], "Is there a RED heart?", ["yes"]),
    blip_jax.Dialog(
      images[2],
      "how many shapes are there?",
      ("one", "two", "three", "four", "five"),
      caption="a picture of a star",
    ),
  )


def ranked(choice):
  return [choice, *choice.others]


def same(one, two):
  for a, b in zip(one, two, strict=True):
    assert [x.text for x in ranked(a)] == [x.text for x in ranked(b)]
    probs = [[x.prob for x in ranked(each)] for each in (a, b)]
    np.testing.assert_allclose(*probs, rtol=1e-4)


def test_a_probability_is_what_the_module_says_of_its_candidate(model):
  dialog = make_dialogs()[0]
  (found,) = model.choose(dialog)
  tokenizer = helpers.scenes_tokenizer()
  mean = np.array([0.48145466, 0.4578275, 0.40821073])
  std = np.array([0.26862954, 0.26130258, 0.27577711])
  pixels = ((dialog.image / 255 - mean) / std).astype(np.float32)
  states = model.apply(pixels[None], method="encode_image")
  context = tokenizer.encode([dialog.caption], 7)
  read = model.apply(*context, method="encode_text")
  kv = model.apply(np.concatenate([states, read], axis=1), method="image_kv")
  said = "is it red? [SEP] no [SEP] what colour is it? [SEP] blue [SEP]"
  texts = [f"{said} where is it? [SEP] {x}" for x in dialog.candidates]
  # Three texts about one image.
  logits = model.apply(*tokenizer.encode(texts, 24), kv, method="match")
  wrong, right = np.asarray(logits).T
  probs = np.exp(right) / (np.exp(right) + np.exp(wrong))
  order = np.argsort(-probs).tolist()
  assert [x.index for x in ranked(found)] == order
  assert [x.text for x in ranked(found)] == [
    dialog.candidates[n] for n in order
  ]
  np.testing.assert_allclose(
    [x.prob for x in ranked(found)], probs[order], rtol=1e-4
  )
  assert repr(found) == (
    f"Choice({found.text!r}, prob={found.prob:.3f}, 2 others)"
  )


def test_results_do_not_depend_on_the_batch(model):
  dialogs = make_dialogs()
  together = model.choose(dialogs)
  assert [len(ranked(each)) for each in together] == [3, 1, 5]
  same(together, [*model.choose_stream(iter(dialogs), batch_size=2)])
  same(together, [model.choose(each)[0] for each in dialogs])


def test_more_candidates_than_are_scored_at_once(model, monkeypatch):
  dialogs = make_dialogs()
  expected = model.choose(dialogs)
  monkeypatch.setattr(choosing, "CANDIDATES_AT_ONCE", 2)
  same(model.choose(dialogs), expected)


@pytest.mark.parametrize(
  "change", [dict(caption="a picture of a ring"), dict(history=())]
)
def test_caption_and_history_count(model, change):
  dialog = make_dialogs()[0]
  one, two = model.choose([dialog, dataclasses.replace(dialog, **change)])
  assert one.prob != pytest.approx(two.prob, rel=1e-4)


def test_images_in_every_form(model, tmp_path):
  dialog = make_dialogs()[0]
  path = tmp_path / "a.png"
  Image.fromarray(dialog.image).save(path)
  forms = [path, str(path), path.read_bytes(), Image.open(path)]
  dialogs = [dataclasses.replace(dialog, image=image) for image in forms]
  same(model.choose(dialogs), model.choose(dialog) * 4)


def test_a_dialog_without_its_image_is_skipped(model, caplog):
  dialogs = [*make_dialogs()]
  dialogs[1] = dataclasses.replace(dialogs[1], image="nowhere.png")
  found = model.choose(dialogs, on_error="skip")
  assert found[1] is None
  same(found[::2], model.choose(make_dialogs())[::2])
  assert "1 of 3 dialogs cannot be read and were skipped" in caplog.text
  with pytest.raises(ValueError, match=r"dialog 1: missing: nowhere\.png"):
    model.choose(dialogs)


def test_a_video_in_place_of_an_image_gets_no_advice_that_does_not_help(
  model, tmp_path
):
  """`choose` takes no videos."""
  path = tmp_path / "a.mp4"
  path.write_bytes(b"video")
  with pytest.raises(ValueError, match="not_an_image") as caught:
    model.choose(choosing.Dialog(str(path), "why?", ["a"]))
  assert "num_frames" not in str(caught.value)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(candidates=[]), r"dialog 1: candidates: expected a list of texts"),
    (dict(candidates="yes"), "candidates: expected a list of texts, .*'yes'"),
    (dict(candidates=None), "candidates: expected a list of texts, .*None"),
    (dict(candidates=["yes", 3]), "dialog 1: expected texts, found 3"),
    (dict(question=" "), "dialog 1: expected a question"),
    (dict(question=3), "dialog 1: expected texts, found 3"),
    (dict(history=["is it?"]), "history: expected pairs of a question and"),
    (dict(history=None), "history: expected pairs of .*, found None"),
    (dict(history=[None]), "history: expected pairs of a question and"),
    (dict(caption="..."), "question .*: empty_caption"),
    (dict(candidates=["yes " * 300]), "a candidate has .*expected at most"),
  ],
)
def test_mistakes(model, change, message):
  first, second, _ = make_dialogs()
  wrong = copy.copy(second)
  for name, value in change.items():
    # Tests check types, which users do not.
    object.__setattr__(wrong, name, value)
  with pytest.raises(ValueError, match=message):
    model.choose(iter([first, wrong]))
  with pytest.raises(
    ValueError, match=r"dialog 0: expected a blip_jax\.Dialog"
  ):
    model.choose(iter(["is it red?"]))


def test_a_model_that_cannot_choose_says_what_can():
  with pytest.raises(ValueError, match=r"'itm', which cannot choose.*visdial"):
    helpers.make_model("itm").choose(make_dialogs())


def test_a_model_without_a_vocabulary_says_so():
  with pytest.raises(ValueError, match=r"no vocabulary.*tokenizer="):
    helpers.make_model("dialog", tokenizer=None).choose(make_dialogs())


def test_devices_share_a_batch(model):
  parallel = helpers.make_model("dialog", mesh=sharding.as_mesh(2))
  same(parallel.choose(make_dialogs()), model.choose(make_dialogs()))
