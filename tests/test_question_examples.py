"""From the record of a question to arrays of fixed shapes."""

import dataclasses

import numpy as np
import pytest

from blip_jax.data import question_examples, scenes, transforms
from tests import helpers

RNG = np.random.default_rng(0)


def make(max_answers=3, max_length=6):
  return question_examples.AnsweredExample(
    question_examples.QuestionExample(
      helpers.scenes_tokenizer(), transforms.EvalImage(16), max_length=12
    ),
    max_answers,
    max_length,
  )


def record(answers, question="Where is the red circle?", **more):
  image = np.zeros((8, 8, 3), np.uint8)
  more = {"question": question, "answers": answers, **more}
  return {"image": image, "id": "x", **more}


def texts(ids):
  return helpers.scenes_tokenizer().decode(ids[:, 1:])


def test_several_questions_about_an_image():
  example = question_examples.GroupExample(make().question, 3)
  asked = [record([]), record([], question="Is it red?")]
  arrays = example({**asked[0], "asked": asked}, RNG)
  assert arrays["image"].shape == (16, 16, 3)
  assert arrays["question_mask"].sum(axis=1).tolist() == [8, 6, 0]
  for number, each in enumerate(asked):
    alone = make().question(each, RNG)["question_ids"]
    np.testing.assert_array_equal(arrays["question_ids"][number], alone)
  blank = example.blank()
  assert {k: x.shape for k, x in blank.items()} == {
    k: x.shape for k, x in arrays.items()
  }


def test_a_question_about_a_video(tmp_path):
  frames = np.stack([np.full((8, 8, 3), n, np.uint8) for n in range(9)])
  helpers.write_video(tmp_path / "a.mkv", frames)
  example = dataclasses.replace(make().question, num_frames=3)
  arrays = example({**record([]), "image": str(tmp_path / "a.mkv")}, RNG)
  assert arrays["image"].shape == (3, 16, 16, 3)
  assert arrays["image"][:, 0, 0, 0].tolist() == [0, 3, 6]
  assert example.blank()["image"].shape == (3, 16, 16, 3)


def test_answers_fill_their_places_by_weight():
  example = make()(record(["left", "top", "top", "one"]), RNG)
  assert texts(example["answer_ids"]) == ["top", "left", "one"]
  np.testing.assert_allclose(example["answer_weight"], [0.5, 0.25, 0.25])
  few = make()(record(["left"]), RNG)
  assert few["answer_mask"].sum(axis=1).tolist() == [3, 0, 0]
  np.testing.assert_allclose(few["answer_weight"], [1, 0, 0])


def test_the_least_answers_are_dropped_if_there_are_too_many():
  example = make(max_answers=1)(record(["left", "top", "top"]), RNG)
  assert texts(example["answer_ids"]) == ["top"]
  np.testing.assert_allclose(example["answer_weight"], [2 / 3])


def test_long_answers_are_dropped_and_not_cut():
  long = "one two three four five six"
  example = make()(record([long, long, "top"]), RNG)
  assert texts(example["answer_ids"]) == ["top", "", ""]
  np.testing.assert_allclose(example["answer_weight"], [1 / 3, 0, 0])
  with pytest.raises(transforms.BadSample, match="max_answer_length"):
    make()(record([long]), RNG)


def test_a_question_without_answers_cannot_be_trained_on():
  with pytest.raises(transforms.BadSample) as error:
    make()(record([]), RNG)
  assert error.value.reason == "no_answer"


def test_questions_are_cleaned_as_the_original_does():
  example = make()(record(["top"], question="Where is (the) CIRCLE!?"), RNG)
  words = helpers.scenes_tokenizer().decode(example["question_ids"][None])
  assert words == ["where is the circle?"]
  assert example["question_mask"].tolist() == [1] * 7 + [0] * 5


def test_a_batch_has_the_same_shapes_whatever_is_in_it():
  example = make()
  good = example(record(["left", "top"]), RNG)
  for batch in ([good, good], [good, example.blank()], [example.blank()] * 2):
    shapes = {key: x.shape for key, x in example.collate(batch).items()}
    assert shapes == {
      "image": (2, 16, 16, 3),
      "question_ids": (2, 12),
      "question_mask": (2, 12),
      "answer_ids": (2, 3, 6),
      "answer_mask": (2, 3, 6),
      "answer_weight": (2, 3),
    }


def test_tokens_of_a_list():
  _, ids, lengths = question_examples.answer_tokens(
    helpers.scenes_tokenizer(), scenes.ANSWERS, 10
  )
  assert lengths.tolist() == [3] * len(scenes.ANSWERS)
  assert ids.shape == (len(scenes.ANSWERS), 3)
  with pytest.raises(ValueError, match="expected 1 to 1 tokens, found 2 or"):
    question_examples.answer_tokens(
      helpers.scenes_tokenizer(), ["one", "red circle"], 3
    )
