"""Answers from Python: of a list or generated, in order, with probabilities."""

import functools
import itertools

import numpy as np
import pytest

from blip_jax.inference import answering, texts
from blip_jax.runtime import sharding
from tests import helpers

LIST = ["yes", "no", "two red circles", "left"]
OPTIONS = dict(min_length=1, max_length=6)


@pytest.fixture(scope="module")
def model():
  return helpers.make_model("vqa")


@functools.cache
def make_images(number):
  rng = np.random.default_rng(number)
  return [rng.integers(0, 256, (20, 30, 3), np.uint8) for _ in range(number)]


ASKED = ["is it red?", "where is the circle?", "how many circles are there?"]


def values(answers):
  return [(x.text, x.prob, x.log_prob, x.score) for x in answers]


def same(one, two):
  assert [x.text for x in one] == [x.text for x in two]
  for a, b in zip(values(one), values(two), strict=True):
    np.testing.assert_allclose(a[1:], b[1:], rtol=1e-4)


def test_no_answer_escapes_its_list(model):
  found = model.answer(make_images(3), ASKED, LIST)
  assert len(found) == 3
  for one in found:
    everything = [one, *one.others]
    assert {x.text for x in everything} == {*LIST}
    assert sum(x.prob for x in everything) == pytest.approx(1, abs=1e-5)
    scores = [x.score for x in everything]
    assert scores == sorted(scores, reverse=True)
    # Among these, probabilities are in the ratio of those among all texts.
    ratio = [x.prob / np.exp(x.log_prob) for x in everything]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)


def test_the_other_score(model):
  found = model.answer(make_images(3), ASKED, LIST, rank_score="albef")
  for one in found:
    # The first token counts twice.
    assert all(x.score < x.log_prob for x in (one, *one.others))


def test_answers_do_not_depend_on_the_batch(model):
  images = make_images(3)
  together = model.answer(images, ASKED, LIST)
  alone = [
    model.answer(image, question, LIST, batch_size=1)[0]
    for image, question in zip(images, ASKED, strict=True)
  ]
  same(together, alone)
  streamed = model.answer_stream(
    iter(images), iter(ASKED), LIST, batch_size=2, num_answers=2
  )
  streamed = [*streamed]
  same(together, streamed)
  assert [len(x.others) for x in streamed] == [1] * 3


def test_generated_answers_and_their_probability(model):
  found = model.answer(make_images(3), ASKED, num_beams=2, **OPTIONS)
  for one in found:
    assert one.prob == pytest.approx(np.exp(one.log_prob), rel=1e-5)
    assert len(one.others) == 1
  greedy = model.answer(make_images(3), ASKED, num_beams=1, **OPTIONS)
  assert not any(x.others for x in greedy)
  more = model.answer(make_images(1), ASKED[0], num_answers=3, **OPTIONS)
  assert len(more[0].others) == 2


def test_padding_counts_only_as_in_the_original(model):
  """Alone, the shorter question has no padding that could be attended to."""
  images, short, long = make_images(2), ASKED[0], " ".join(ASKED[1:])
  options = dict(num_beams=1, **OPTIONS)
  for legacy in (False, True):
    answer = functools.partial(model.answer, legacy_mask=legacy, **options)
    together = answer(images, [short, long])[0]
    alone = answer(images[:1], short)[0]
    is_same = together.log_prob == pytest.approx(alone.log_prob, rel=1e-4)
    assert is_same != legacy


def test_a_question_about_all_images_and_an_image_with_many(model):
  images = make_images(3)
  every = model.answer(images, ASKED[0], LIST)
  same(every, model.answer(images, [ASKED[0]] * 3, LIST))
  one = model.answer(images[0], ASKED, LIST)
  same(one, model.answer([images[0]] * 3, ASKED, LIST))
  same(one, model.answer(images[0], iter(ASKED), LIST, batch_size=2))


@pytest.mark.parametrize("num_devices", [1, 2])
def test_an_image_with_many_questions_is_encoded_once(
  model, monkeypatch, num_devices
):
  """On each device, and for a batch of questions."""
  if num_devices > 1:
    model = helpers.make_model("vqa", mesh=sharding.as_mesh(num_devices))
  shapes = []
  answer = answering.Answerer.__call__

  def noted(self, pixels, ids, mask):
    shapes.append((len(pixels), len(ids)))
    return answer(self, pixels, ids, mask)

  monkeypatch.setattr(answering.Answerer, "__call__", noted)
  (image,) = make_images(1)
  asked = [f"{question} {n}" for n in range(3) for question in ASKED]
  each = model.answer([image] * 9, asked, LIST, batch_size=9)
  assert shapes.pop()[0] >= 9
  same(each, model.answer(image, asked, LIST, batch_size=16))
  assert shapes == [(num_devices, 16)]
  same(each, model.answer(image, asked, LIST, batch_size=4))
  assert shapes[1:] == [(num_devices, 4)] * 3
  found = model.answer(b"nothing", asked, LIST, on_error="skip")
  assert found == [None] * 9


def make_video(number, num_frames=5):
  rng = np.random.default_rng(number)
  return rng.integers(0, 256, (num_frames, 20, 30, 3), np.uint8)


def test_one_frame_is_answered_as_its_image(model):
  videos = [make_video(n) for n in range(3)]
  same(
    model.answer(videos, ASKED, LIST, num_frames=1),
    model.answer([video[0] for video in videos], ASKED, LIST),
  )
  same(
    model.answer(videos[0], ASKED, num_frames=1, **OPTIONS),
    model.answer(videos[0][0], ASKED, **OPTIONS),
  )


def test_answers_do_not_depend_on_the_order_of_frames(model):
  """They have no positions; but other frames are another video."""
  video = make_video(0)
  answer = functools.partial(
    model.answer, questions=ASKED, answers=LIST, num_frames=5
  )
  found = answer(video)
  same(found, answer(video[[3, 0, 4, 1, 2]]))
  same(found, answer([[*video]]))
  other = answer(video[[0, 0, 0, 1, 2]])
  log_probs = [[x.log_prob for x in each] for each in (found, other)]
  assert not np.allclose(*log_probs, rtol=1e-4)


def test_a_broken_video_costs_itself(model, tmp_path):
  helpers.write_video(tmp_path / "a.mkv", make_video(0))
  (tmp_path / "b.mkv").write_text("nothing")
  videos = [tmp_path / "a.mkv", tmp_path / "b.mkv", make_video(1)]
  found = model.answer(videos, ASKED, LIST, num_frames=4, on_error="skip")
  assert [each is None for each in found] == [False, True, False]
  alone = model.answer([videos[0]], ASKED[:1], LIST, num_frames=4)
  same(found[:1], alone)
  with pytest.raises(ValueError, match=r"image 1: broken_video: .*b\.mkv"):
    model.answer(videos, ASKED, LIST, num_frames=4)
  with pytest.raises(ValueError, match="num_frames=8 takes 8 frames"):
    model.answer(videos[0], ASKED[0], LIST)


def test_the_model_abstains_below_a_probability(model):
  (sure,) = model.answer(make_images(1), ASKED[0], LIST)
  for threshold, abstains in ((sure.prob - 1e-3, False), (sure.prob + 1e-3, 1)):
    threshold = float(np.clip(threshold, 0, 1))
    (one,) = model.answer(
      make_images(1), ASKED[0], LIST, abstain_below=threshold
    )
    if threshold > sure.prob and abstains:
      assert one.abstains and not one.text
      assert one.others[0].text == sure.text
      assert len(one.others) == len(LIST)
    elif not abstains:
      assert not one.abstains and one.text == sure.text


def test_images_that_cannot_be_read_are_skipped(model):
  images = [make_images(3)[0], b"nothing", make_images(3)[2]]
  found = model.answer(images, ASKED, LIST, on_error="skip")
  assert found[1] is None
  same([found[0], found[2]], model.answer(make_images(3), ASKED, LIST)[::2])
  with pytest.raises(ValueError, match="image 1"):
    model.answer(images, ASKED, LIST)


def test_long_questions_are_cut_and_reported(model, caplog):
  model.answer(make_images(1), "is it red " * 30, LIST)
  assert "1 questions have more than 50 words or 35 tokens" in caplog.text


def test_questions_without_an_image_are_reported(model, caplog):
  (found,) = model.answer(iter(make_images(1)), iter(ASKED), LIST)
  same([found], model.answer(make_images(1), ASKED[0], LIST))
  assert "there are more questions than images" in caplog.text
  caplog.clear()
  model.answer(make_images(1), ASKED[0], LIST)
  assert not caplog.text


def test_answers_that_a_model_cannot_tell_apart_count_once(model, caplog):
  """Else they would share their probability."""
  images = make_images(3)
  found = model.answer(images, ASKED, [*LIST, "Yes", " no "])
  same(found, model.answer(images, ASKED, LIST))
  assert "2 of 6 answers have the tokens of an earlier one" in caplog.text
  assert "'Yes' has those of 'yes'" in caplog.text


def test_a_list_in_a_file(model, tmp_path):
  path = tmp_path / "answers.txt"
  path.write_text("\n".join(LIST))
  same(
    model.answer(make_images(1), ASKED[0], path),
    model.answer(make_images(1), ASKED[0], LIST),
  )


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(answers=[]), "answers: expected at least one answer"),
    (dict(answers=LIST, num_beams=2), r"\['num_beams'\]: options of gen"),
    (dict(abstain_below=2.0), "abstain_below: expected a probability"),
    (dict(k_test=0), "k_test: expected 1 or more"),
    (dict(sample=True, num_beams=1), "sample: answers are found by beam"),
    (dict(num_frames=-1), "num_frames: expected 0 or more, found -1"),
    (dict(batch_size=-1), "batch_size: expected 0 or more, found -1"),
    (dict(questions="a " * 60_000), "question 'a a .*: too_long: 120000 bytes"),
    (dict(beams=2), "beams: no such decoding option"),
    (dict(questions=["a?", "b?"]), "found 3 images and 2 questions"),
    (dict(questions=iter(["a?"])), "fewer questions than images"),
    (dict(questions="..."), r"question '\.\.\.': empty"),
  ],
)
def test_mistakes(model, options, message):
  arguments = {"questions": ASKED, **options}
  with pytest.raises(ValueError, match=message):
    model.answer(make_images(3), **arguments)


def test_an_unknown_score_is_refused(model):
  with pytest.raises(ValueError, match=r"rank_score: expected one of .*'bleu'"):
    model.answerer(LIST, rank_score="bleu")


def test_a_model_that_cannot_answer_says_which_can():
  with pytest.raises(ValueError, match=r"'caption'.*model_base_vqa_capfilt"):
    helpers.make_model("caption").answer(make_images(1), "what?")


def test_devices_share_a_batch(model):
  parallel = helpers.make_model("vqa", mesh=sharding.as_mesh(2))
  same(
    parallel.answer(make_images(3), ASKED, LIST),
    model.answer(make_images(3), ASKED, LIST),
  )


def test_pairs_of_endless_iterators():
  images, asked = texts.paired(itertools.count(), "why?", answering.NAMES)
  assert next(iter(images)) == 0 and next(asked) == "why?"
