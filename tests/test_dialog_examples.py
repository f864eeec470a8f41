"""From the record of a dialog to arrays: history, candidates, sampling."""

import json

import numpy as np
import pytest

from blip_jax.data import datasets, dialog_examples, dialogs, transforms
from tests import helpers

TOKENIZER = helpers.scenes_tokenizer()
ROUNDS = (
  dialogs.Round("Where is it?", "left", ("left", "right"), 0),
  dialogs.Round("what colour is it?", "red", ("red", "blue", "two"), 0),
  dialogs.Round("is the other one a heart?", "no", ("yes", "no"), 1),
)
RECORD = {
  "image": np.full((8, 8, 3), 7, np.uint8),
  "context": "A picture of a heart.",
  "dialog": ROUNDS,
  "id": "x",
}


def make(rounds=3, candidates=3, sampled=False, **lengths):
  lengths = {"max_length": 40, "context_length": 8, **lengths}
  texts = dialog_examples.DialogTexts(TOKENIZER, **lengths)
  return dialog_examples.DialogExample(
    texts, transforms.EvalImage(16), rounds, candidates, sampled
  )


def build(seed=0, record=RECORD, **options):
  return make(**options)(record, np.random.default_rng(seed))


def words(ids, mask):
  """The tokens of a text, without its padding."""
  assert (np.diff(mask) <= 0).all() and (ids[mask == 0] == 0).all()
  return " ".join(TOKENIZER.pieces(ids[mask == 1].tolist()))


def texts(example):
  """The texts of each round."""
  return [
    [words(*row) for row in zip(ids, mask, strict=True) if row[1].any()]
    for ids, mask in zip(
      example["input_ids"], example["attention_mask"], strict=True
    )
  ]


FIRST = "where is it ? [SEP] left [SEP]"
SECOND = "what colour is it ? [SEP] red [SEP]"
THIRD = "is the other one a heart ? [SEP]"


def test_a_text_is_the_history_the_question_and_a_candidate():
  example = build()
  assert texts(example) == [
    [f"[CLS] where is it ? [SEP] {x} [SEP]" for x in ("left", "right")],
    [
      f"[CLS] {FIRST} what colour is it ? [SEP] {x} [SEP]"
      for x in ("red", "blue", "two")
    ],
    [f"[CLS] {FIRST} {SECOND} {THIRD} {x} [SEP]" for x in ("yes", "no")],
  ]
  np.testing.assert_array_equal(
    example["label"], [[1, 0, 0], [1, 0, 0], [0, 1, 0]]
  )
  assert (example["image"] == 7).all()
  context = words(example["context_ids"], example["context_mask"])
  assert context == "[CLS] a picture of a heart [SEP]"


@pytest.mark.parametrize(
  "length, history",
  [
    (26, f"{FIRST} {SECOND} "),
    (25, f"{SECOND} "),
    (19, f"{SECOND} "),
    (18, ""),
    (11, ""),
  ],
)
def test_the_oldest_rounds_are_left_out_if_a_text_is_too_long(length, history):
  """All candidates of a round have the same history."""
  found = texts(build(max_length=length))[2]
  assert found == [f"[CLS] {history}{THIRD} {x} [SEP]" for x in ("yes", "no")]


def test_a_question_is_cut_and_a_candidate_is_not():
  long = "two red hearts"
  record = RECORD | {"dialog": (ROUNDS[2]._replace(candidates=("no", long)),)}
  found = texts(build(record=record, max_length=8))[0]
  assert found == [f"[CLS] is the other {x} [SEP]" for x in ("no", long)]
  with pytest.raises(transforms.BadSample, match=r"config\.data\.max_le"):
    build(record=record, max_length=4)


def test_rounds_without_candidates_are_history_only():
  rounds = (ROUNDS[0]._replace(candidates=(), right=None), ROUNDS[1])
  example = build(record=RECORD | {"dialog": rounds})
  asked = f"[CLS] {FIRST} what colour is it ? [SEP]"
  assert texts(example)[0][0] == f"{asked} red [SEP]"
  assert not example["attention_mask"][1:].any()


def test_a_secret_answer_is_no_candidate_that_is_right():
  secret = ROUNDS[1]._replace(answer="", right=None)
  example = build(record=RECORD | {"dialog": (ROUNDS[0], secret)})
  assert not example["label"][1].any()
  assert texts(example)[1][0].endswith("what colour is it ? [SEP] red [SEP]")


def test_answers_may_be_dots_or_nothing():
  answers = ROUNDS[0]._replace(candidates=("...", "", "left"), right=2)
  found = texts(build(record=RECORD | {"dialog": (answers,)}))[0]
  assert [text.removeprefix("[CLS] where is it ? [SEP]") for text in found] == [
    *(" . . . [SEP]", " [SEP]", " left [SEP]")
  ]


def test_without_a_caption_the_context_is_padding():
  example = build(record=RECORD | {"context": ""})
  assert not example["context_mask"].any()


def test_training_samples_rounds_and_wrong_candidates():
  seen = set()
  for seed in range(60):
    example = build(seed, rounds=1, candidates=2, sampled=True)
    (found,) = texts(example)
    np.testing.assert_array_equal(example["label"], [[1, 0]])
    seen.add(tuple(text.rpartition("?")[2] for text in found))
  expected = {
    *(("left", "right"), ("red", "blue"), ("red", "two"), ("no", "yes"))
  }
  assert seen == {
    tuple(f" [SEP] {text} [SEP]" for text in pair) for pair in expected
  }


def test_training_pads_what_a_round_or_a_dialog_lacks():
  example = build(rounds=4, candidates=4, sampled=True)
  numbers = example["attention_mask"].any(axis=-1).sum(axis=-1)
  assert sorted(numbers.tolist()) == [0, 2, 2, 3]
  assert example["label"].sum(axis=-1).tolist() == [1, 1, 1, 0]


def test_training_needs_a_right_and_a_wrong_candidate():
  rounds = (
    ROUNDS[0]._replace(right=None),
    ROUNDS[1]._replace(candidates=("red",)),
  )
  with pytest.raises(transforms.BadSample) as error:
    build(record=RECORD | {"dialog": rounds}, sampled=True)
  assert error.value.reason == "no_candidates"


def test_the_largest_dialog_of_a_source_decides_shapes(tmp_path):
  """Rows that cannot be read do not."""
  options = [["a"], ["a", "b", "c"], None, ["a", "b"]]
  rounds = [{"question": "is it?", "answer_options": x} for x in options]
  rows = [{"image": "a.png", "dialog": rounds[n:]} for n in range(4)]
  rows.append({"image": "a.png", "dialog": [*rounds, *rounds, {}]})
  path = tmp_path / "d.json"
  path.write_text(json.dumps(rows))
  source = datasets.open_dialogs(str(path))
  assert dialog_examples.most(source, 3, 3) == (3, 3)
  # The first dialog alone has three rounds, of which one has three candidates.
  assert dialog_examples.most(source, 2, 3) == (2, 3)
  assert dialog_examples.most(source, 3, 2) == (1, 2)


@pytest.mark.parametrize("sampled", [True, False])
def test_a_batch_has_the_same_shapes_whatever_is_in_it(sampled):
  example = make(sampled=sampled)
  good = example(RECORD, np.random.default_rng(0))
  for batch in ([good, good], [good, example.blank()], [example.blank()] * 2):
    arrays = example.collate(batch)
    assert {key: (x.shape, x.dtype) for key, x in arrays.items()} == {
      "image": ((2, 16, 16, 3), np.uint8),
      "context_ids": ((2, 8), np.int32),
      "context_mask": ((2, 8), np.int32),
      "input_ids": ((2, 3, 3, 40), np.int32),
      "attention_mask": ((2, 3, 3, 40), np.int32),
      "label": ((2, 3, 3), np.int32),
    }
