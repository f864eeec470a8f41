"""VQA's accuracy: agreement with the annotators, ten of each question."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from blip_jax.evaluators.scores import vqa_text

# official: as the evaluation server, which normalises answers only where the
# annotators differ. lenient: always normalises, as newer programs do.
PROTOCOLS = ("official", "lenient")
_AGREEING = 3  # annotators who make an answer fully right


@dataclasses.dataclass(frozen=True)
class Question:
  """What is right about a question.

  Attributes:
    answers: of its annotators.
    answer_type: such as "yes/no", "number" or "other"; "" if unknown.
    question_type: its first words; "" if unknown.
  """

  answers: Sequence[str]
  answer_type: str = ""
  question_type: str = ""


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """Accuracies in percent."""

  overall: float
  per_answer_type: Mapping[str, float]
  per_question_type: Mapping[str, float]

  def as_json(self) -> dict[str, Any]:
    """The accuracies under the names of the official evaluation."""
    return {
      "overall": self.overall,
      "perAnswerType": dict(self.per_answer_type),
      "perQuestionType": dict(self.per_question_type),
    }


def of_answer(
  answer: str, truth: Sequence[str], protocol: str = "official"
) -> float:
  """The accuracy of an answer, from 0 to 1.

  Each annotator is left out in turn, and three of the others who agree make an
  answer fully right. The answer of a single annotator is right or wrong.
  """
  answer, *truth = map(vqa_text.stripped, (answer, *truth))
  if protocol == "lenient" or len(set(truth)) > 1:
    answer, *truth = map(vqa_text.normalised, (answer, *truth))
  agree = np.array([other == answer for other in truth])
  if len(truth) == 1:
    return float(agree[0])
  others = agree.sum() - agree
  return float(np.mean(np.minimum(others / _AGREEING, 1)))


def score(
  answers: Mapping[Any, str],
  questions: Mapping[Any, Question],
  protocol: str = "official",
) -> Accuracy:
  """Scores the answers of questions, by their ids.

  Raises:
    ValueError: there is no such protocol, or no answer is of these questions.
  """
  if protocol not in PROTOCOLS:
    raise ValueError(
      f"protocol: expected one of {PROTOCOLS}, found {protocol!r}"
    )
  scored = [id for id in answers if id in questions]
  if not scored:
    ids = [next(iter(each), None) for each in (answers, questions)]
    raise ValueError(
      f"none of {len(answers)} answers is of one of {len(questions)} "
      f"questions: the first ids are {ids[0]!r} and {ids[1]!r}"
    )
  by_answer, by_question = map(collections.defaultdict, (list, list))
  total = []
  for id in scored:
    question = questions[id]
    accuracy = of_answer(answers[id], question.answers, protocol)
    total.append(accuracy)
    by_answer[question.answer_type].append(accuracy)
    by_question[question.question_type].append(accuracy)
  return Accuracy(_percent(total), _percents(by_answer), _percents(by_question))


def _percents(groups: Mapping[str, list[float]]) -> dict[str, float]:
  return {name: _percent(group) for name, group in groups.items() if name}


def _percent(accuracies: Sequence[float]) -> float:
  return 100 * float(np.mean(accuracies))


def calibration_error(
  probs: Float[np.ndarray, " n"],
  correct: Bool[np.ndarray, " n"] | Float[np.ndarray, " n"],
  num_bins: int = 15,
) -> float:
  """The expected calibration error, from 0 to 1.

  Answers are grouped by their probability, in bins of equal width; the error is
  the mean distance between probability and accuracy of a bin, weighted by the
  number of its answers (Guo et al., 2017).
  """
  bins = np.minimum((probs * num_bins).astype(int), num_bins - 1)
  gaps = np.bincount(bins, probs - correct, num_bins)
  return float(np.abs(gaps).sum() / len(probs))
