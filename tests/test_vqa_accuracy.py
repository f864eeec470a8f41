"""VQA's accuracy against the official program, and calibration."""

import itertools
import json

import numpy as np
import pytest

from blip_jax.evaluators.scores import vqa_accuracy
from blip_jax.evaluators.scores.vqa_accuracy import Question


def by_subsets(answer, truth):
  """The mean over all subsets without one annotator, by the definition."""
  accuracies = [
    min(subset.count(answer) / 3, 1)
    for subset in itertools.combinations(truth, len(truth) - 1)
  ]
  return sum(accuracies) / len(accuracies)


@pytest.mark.parametrize("count", range(11))
def test_accuracy_by_its_definition(count):
  truth = ["red"] * count + ["blue"] * (10 - count)
  actual = vqa_accuracy.of_answer("red", truth)
  assert actual == pytest.approx(by_subsets("red", truth))


def test_only_disputed_answers_are_normalised():
  """As the official program does; the lenient protocol always normalises."""
  agreed, disputed = ["none"] * 10, ["none"] * 9 + ["no"]
  assert vqa_accuracy.of_answer("0", agreed) == 0
  assert vqa_accuracy.of_answer("0", disputed) == 1
  assert vqa_accuracy.of_answer("0", agreed, "lenient") == 1
  assert vqa_accuracy.of_answer("None.", agreed, "lenient") == 1
  assert vqa_accuracy.of_answer("None.", agreed) == 0


def test_a_single_annotator_is_right_or_wrong():
  assert vqa_accuracy.of_answer("two", ["two"]) == 1
  assert vqa_accuracy.of_answer("2", ["two"]) == 0
  assert vqa_accuracy.of_answer("2", ["two"], "lenient") == 1


def test_groups():
  questions = {
    1: Question(["yes"] * 10, "yes/no", "is the"),
    2: Question(["red"] * 10, "other", "what"),
    3: Question(["two"] * 10, "other"),
  }
  scored = vqa_accuracy.score(
    {1: "yes", 2: "blue", 3: "two", 9: "x"}, questions
  )
  assert scored.overall == pytest.approx(200 / 3)
  assert scored.as_json()["perAnswerType"] == {"yes/no": 100, "other": 50}
  assert scored.as_json()["perQuestionType"] == {"is the": 100, "what": 0}


def test_what_cannot_be_scored():
  with pytest.raises(ValueError, match=r"none of 1 answers .* 1 questions"):
    vqa_accuracy.score({"1": "yes"}, {1: Question(["yes"])})
  with pytest.raises(ValueError, match=r"official.*lenient.*'strict'"):
    vqa_accuracy.score({1: "yes"}, {1: Question(["yes"])}, "strict")


@pytest.mark.parametrize("name", ["yes", "majority", "random"])
def test_the_official_program_gives_the_same(shared_dir, name):
  folder = shared_dir / "data/vqa_eval"
  read = lambda file: json.loads((folder / file).read_text())
  questions = {
    row["question_id"]: Question(
      [each["answer"] for each in row["answers"]],
      row["answer_type"],
      row["question_type"],
    )
    for row in read("annotations_400.json")
  }
  answers = {
    row["question_id"]: row["answer"] for row in read(f"results_{name}.json")
  }
  scored = vqa_accuracy.score(answers, questions).as_json()
  expected = read(f"expected_{name}.json")["accuracy"]
  assert scored["overall"] == pytest.approx(expected["overall"], abs=0.01)
  for group in ("perAnswerType", "perQuestionType"):
    assert scored[group] == pytest.approx(expected[group], abs=0.01)


def test_calibration_error():
  probs = np.array([0.95, 0.95, 0.55, 0.55])
  right = np.array([1.0, 1.0, 1.0, 0.0])
  error = vqa_accuracy.calibration_error(probs, right)
  assert error == pytest.approx(0.5 * 0.05 + 0.5 * 0.05)
  assert vqa_accuracy.calibration_error(np.ones(3), np.ones(3)) == 0
  assert vqa_accuracy.calibration_error(np.ones(2), np.zeros(2)) == 1
