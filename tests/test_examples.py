"""From records to examples, and from examples to batches."""

import dataclasses
import itertools

import numpy as np
import pytest

from blip_jax.data import (
  datasets,
  examples,
  loader,
  randaugment,
  rejects,
  scenes,
  tokenizer,
  transforms,
)

# --- ragged examples ---------------------------------------------------------

ANSWERS = {
  "red": ["red"],
  "round": ["a circle", "circle"],
  "three": ["3", "three", "three circles"],
}
QUESTION_LENGTH, ANSWER_LENGTH, MAX_ANSWERS = 8, 6, 4


@dataclasses.dataclass(frozen=True)
class Questions:
  """Questions with one, two or three weighted answers, in turn.

  Rows of `bad` cannot become examples.
  """

  num: int
  bad: tuple[int, ...] = ()

  def __len__(self):
    return self.num

  def __getitem__(self, row):
    names = list(ANSWERS)
    answers = ANSWERS[names[row % 3]]
    weights = np.arange(1, len(answers) + 1) + row
    return {
      "id": f"questions:{row}",
      "question": "" if row in self.bad else f"what is it {row % 10}",
      "answers": dict(zip(answers, weights / weights.sum(), strict=True)),
    }


@dataclasses.dataclass(frozen=True)
class QuestionExample:
  """A question and all of its answers, as many as there are.

  A batch lists the answers of all questions one after the other. Its unused
  rows at the end have weight 0, so that every batch has the same shapes.
  """

  tokenizer: tokenizer.Tokenizer

  open_source = staticmethod(datasets.open_questions)

  def __call__(self, record, rng):
    question = transforms.clean_text(record["question"])
    ids, _ = self.tokenizer.encode([question], QUESTION_LENGTH)
    answers, _ = self.tokenizer.encode([*record["answers"]], ANSWER_LENGTH)
    weights = np.array([*record["answers"].values()], np.float32)
    return {
      "question": ids[0],
      "answers": list(zip(answers, weights, strict=True)),
    }

  def blank(self):
    return {"question": np.zeros(QUESTION_LENGTH, np.int32), "answers": []}

  def collate(self, examples):
    size = MAX_ANSWERS * len(examples)
    batch = {
      "question": np.stack([example["question"] for example in examples]),
      "answer": np.zeros((size, ANSWER_LENGTH), np.int32),
      "weight": np.zeros(size, np.float32),
      "row": np.zeros(size, np.int32),
    }
    row = 0
    for number, example in enumerate(examples):
      for answer, weight in example["answers"]:
        batch["answer"][row], batch["weight"][row] = answer, weight
        batch["row"][row] = number
        row += 1
    return batch


SHAPES = {
  "question": (4, QUESTION_LENGTH),
  "answer": (4 * MAX_ANSWERS, ANSWER_LENGTH),
  "weight": (4 * MAX_ANSWERS,),
  "row": (4 * MAX_ANSWERS,),
  "valid": (4,),
}


@pytest.fixture(scope="module")
def words():
  return tokenizer.Tokenizer.load(scenes.vocab_dir())


def _answers(batch, number, words):
  """Returns the weighted answers of one question of a batch."""
  used = (batch["row"] == number) & (batch["weight"] > 0)
  texts = words.decode(batch["answer"][used])
  return dict(zip(texts, batch["weight"][used], strict=True))


def _check_rows(source, batch, ids, words):
  """Checks every valid row of a batch against its record."""
  assert {key: array.shape for key, array in batch.items()} == SHAPES
  for number in np.flatnonzero(batch["valid"]):
    record = source[int(ids[number].removeprefix("questions:"))]
    (question,) = words.decode(batch["question"][[number]])
    assert question == record["question"]
    answers = _answers(batch, number, words)
    assert answers == pytest.approx(record["answers"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_ragged_examples_are_trained_on_in_fixed_shapes(words, num_workers):
  source = Questions(11, bad=(4,))
  example = QuestionExample(words)
  assert isinstance(example, examples.Example)
  bad = rejects.BadSamples(max_fraction=0.5)
  batches = loader.train_loader(
    [source],
    example,
    batch_size=4,
    seed=0,
    num_workers=num_workers,
    num_threads=2,
    bad_samples=bad,
  )
  seen, answer_counts = set(), set()
  for batch, ids in itertools.islice(batches, 5):  # two epochs of 10 good rows
    assert batch["valid"].all()
    _check_rows(source, batch, ids, words)
    seen.update(ids)
    answer_counts.add((batch["weight"] > 0).sum())
  batches.close()
  assert seen == {f"questions:{row}" for row in range(11) if row != 4}
  assert len(answer_counts) > 1, "all batches have as many answers"
  assert bad.reasons["empty_caption"] >= 1


def test_unusable_ragged_examples_are_blank_in_evaluation(words):
  source = Questions(6, bad=(4,))
  bad = rejects.BadSamples(max_fraction=0.5)
  batches = list(
    loader.eval_loader(source, QuestionExample(words), 4, bad_samples=bad)
  )
  assert [ids for _, ids in batches] == [
    ["questions:0", "questions:1", "questions:2", "questions:3"],
    ["questions:4", "questions:5", "", ""],
  ]
  for batch, ids in batches:
    _check_rows(source, batch, ids, words)
  (_, _), (last, _) = batches
  assert last["valid"].tolist() == [False, True, False, False]
  assert not last["question"][~last["valid"]].any()
  for number in (0, 2, 3):
    assert _answers(last, number, words) == {}
  assert dict(bad.reasons) == {"empty_caption": 1}


# --- images and captions -----------------------------------------------------


def _image():
  return np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)


def _record(caption):
  return {"image": _image(), "caption": caption, "id": "x:0"}


def test_an_example_is_the_image_and_its_tokens(words):
  make = examples.PairExample(words, transforms.EvalImage(16), 4, 10)
  made = make(_record("A RED circle!!\x00 above a square"), _rng())
  ids, mask = words.encode(["a red circle above"], 10)
  np.testing.assert_array_equal(made["input_ids"], ids[0])
  np.testing.assert_array_equal(made["attention_mask"], mask[0])
  still = transforms.EvalImage(16)(_image())
  np.testing.assert_array_equal(made["image"], still)
  assert made["image"].dtype == np.uint8 and made["input_ids"].dtype == np.int32


def _rng(seed=0):
  return np.random.default_rng(seed)


def test_a_training_image_depends_on_the_generator(words):
  augment = randaugment.RandAugment(2, 5)
  train = transforms.TrainImage(16, 0.2, augment)
  make = examples.PairExample(words, train)
  images = [make(_record("red"), _rng(seed))["image"] for seed in (0, 0, 1)]
  np.testing.assert_array_equal(images[0], images[1])
  assert (images[0] != images[2]).any()


def test_each_visit_samples_one_of_the_captions(words):
  make = examples.PairExample(words, transforms.EvalImage(8))
  captions = ["a red circle", "a blue square", b"a green star"]
  made = [make(_record(captions), _rng(seed)) for seed in range(30)]
  texts = words.decode(np.stack([m["input_ids"] for m in made]))
  assert set(texts) == {"a red circle", "a blue square", "a green star"}


@pytest.mark.parametrize("caption", ["", " ", "...", '"!"'])
def test_a_caption_without_words_is_bad(words, caption):
  make = examples.PairExample(words, transforms.EvalImage(8))
  with pytest.raises(transforms.BadSample, match="empty_caption"):
    make(_record(caption), _rng())


def test_too_many_pixels_are_refused(words):
  make = examples.PairExample(
    words, transforms.EvalImage(8), max_pixels=40 * 30 - 1
  )
  with pytest.raises(transforms.BadSample, match="too_large"):
    make(_record("red"), _rng())
