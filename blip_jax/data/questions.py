"""Questions about images and their answers, from the rows of files.

The record of a row has, besides the image,

  question     text
  question_id  how the file identifies it; the record's id if it does not
  answers      of the annotators, or of the row; absent if there are none
  weights      a number for each of the answers; absent if they are equal
  row_weight   a number, by which all weights are multiplied
  answer_type, question_type    as `types` returns them; absent if not known
"""

import collections
import json
import logging
import math
import os
from collections.abc import Collection, Mapping
from typing import Any

from blip_jax.data import sources, transforms
from blip_jax.data.scenes import asking
from blip_jax.runtime import files

log = logging.getLogger(__name__)

# The first name that a row has wins.
QUESTION = "question"
IDS = ("question_id", "questionId")
ANSWERS = ("answers", "answer", "direct_answers")
WEIGHT = "weight"
# Accuracies on questions that have no type are published by their first word.
_WORDS = ("what", "who", "how", "when", "where", "which", "why")
# As in the original, whose files name the data set of a row: an answer of
# Visual Genome has a fifth of the weight of a question's answers in VQA.
DATASET_WEIGHTS = {"vg": 0.2}
# A far larger one makes the loss of a whole batch infinite.
_MAX_WEIGHT = 1_000_000


def check(columns: Collection[str], where: str) -> None:
  """Raises `ValueError` unless there is a column of questions."""
  if QUESTION not in columns:
    raise ValueError(
      f"{where}: expected text under {QUESTION!r}, found {list(columns)!r:.200}"
    )


def record(row: Mapping[str, Any], id: str, where: str) -> sources.Record:
  """Returns what a record has of the row's question.

  Raises:
    BadRow: there is no question in UTF-8, or an answer or a weight of another
      type.
  """
  question = row.get(QUESTION)
  if not sources.is_text(question) or not question.strip():
    detail = f"{where}: expected a question, found {question!r:.200}"
    raise sources.BadRow(id, "missing_question", detail)
  found = sources.first_id(row, IDS)
  values: sources.Record = {
    "question": question,
    "question_id": id if found is None else found,
  }
  texts = answers(row, id, where)
  if texts:
    values["answers"] = texts
  weight = _weight(row, id, where)
  if isinstance(weight, list):
    if len(weight) != len(texts):
      detail = (
        f"{where}: expected a weight for each of {len(texts)} answers, found "
        f"{len(weight)}"
      )
      raise sources.BadRow(id, "broken_row", detail)
    values["weights"] = weight
  else:
    values["row_weight"] = weight
  return values | {name: type for name, type in types(row).items() if type}


def types(row: Mapping[str, Any]) -> dict[str, str]:
  """Returns `answer_type` and `question_type` of a row, each as one line, since
  accuracies are published under these names; "" where there is none."""
  found = {name: row.get(name) for name in ("answer_type", "question_type")}
  return {
    name: files.printable(type) if isinstance(type, str) else ""
    for name, type in found.items()
  }


def answers(row: Mapping[str, Any], id: str, where: str) -> list[str]:
  """Returns the answers of a row: a text, or a list of texts or of objects.

  Raises:
    BadRow: one is no text, or not UTF-8.
  """
  name = next((name for name in ANSWERS if row.get(name) is not None), None)
  found = [] if name is None else row[name]
  found = found if isinstance(found, (list, tuple)) else [found]
  texts = [_text(each) for each in found]
  wrong = [text for text in texts if not sources.is_text(text)]
  if wrong:
    detail = f"{where}: {name!r}: expected texts, found {wrong[0]!r:.200}"
    raise sources.BadRow(id, "broken_row", detail)
  return [text for text in texts if text.strip()]


def _text(value: Any) -> Any:
  """The text of an answer; another value as it is."""
  value = value.get("answer") if isinstance(value, Mapping) else value
  # A number, such as a count, is an answer like any other.
  is_count = isinstance(value, int) and not isinstance(value, bool)
  return str(value) if is_count else value


def _weight(row: Mapping[str, Any], id: str, where: str) -> float | list[float]:
  value = row.get(WEIGHT)
  if value is None or value == "":
    return DATASET_WEIGHTS.get(str(row.get("dataset")), 1.0)
  try:
    weights = [
      float(x) for x in (value if isinstance(value, list) else [value])
    ]
  except (TypeError, ValueError, OverflowError):
    weights = [math.nan]
  if not all(0 <= weight <= _MAX_WEIGHT for weight in weights):
    detail = (
      f"{where}: {WEIGHT!r}: expected 0 to {_MAX_WEIGHT}, found {value!r:.200}"
    )
    raise sources.BadRow(id, "broken_row", detail)
  return weights if isinstance(value, list) else weights[0]


def weighted(record: sources.Record) -> dict[str, float]:
  """Returns the distinct answers of a record, and what each weighs.

  As in the original, that is the share of annotators who gave the answer.
  """
  texts = record.get("answers", [])
  scale = record.get("row_weight", 1.0) / max(len(texts), 1)
  weights = record.get("weights", [scale] * len(texts))
  total: dict[str, float] = collections.defaultdict(float)
  for answer, weight in zip(texts, weights, strict=True):
    total[answer] += weight
  return dict(total)


def question_type(record: sources.Record) -> str:
  """Returns the type of a question, else its first word if that asks for
  something, such as "who"; "" if it does not."""
  word = record["question"].split()[0].lower()
  return record.get("question_type", word if word in _WORDS else "")


def cleaned(question: str, max_words: int) -> str:
  """Returns a question as a model reads it; see `transforms.pre_question`.

  Raises:
    BadSample: it is not UTF-8, is too long, or has no words.
  """
  return transforms.pre_question(transforms.clean_text(question), max_words)


def answer_list(listed: Any, where: str) -> list[str]:
  """Returns the answers of a list, each once; reports those that are repeated.

  Raises:
    ValueError: there are none, or one is no text, is empty, or is not UTF-8.
  """
  if isinstance(listed, str) or not isinstance(listed, (list, tuple)):
    raise ValueError(
      f"{where}: expected a list of answers, found {listed!r:.200}"
    )
  if not listed:
    raise ValueError(f"{where}: expected at least one answer, found none")
  for number, answer in enumerate(listed):
    if not sources.is_text(answer) or not answer.strip():
      raise ValueError(
        f"{where}: answer {number}: expected a text, found {answer!r:.200}"
      )
  distinct = list(dict.fromkeys(listed))
  if repeated := len(listed) - len(distinct):
    again = [a for a, n in collections.Counter(listed).items() if n > 1]
    log.warning(
      "%s: %d of %d answers are repeated, such as %r; each counts once",
      where,
      repeated,
      len(listed),
      again[0],
    )
  return distinct


def read_answer_list(path: str | os.PathLike) -> list[str]:
  """Reads a list of answers: JSON, or a text file with one on each line.

  "scenes" stands for the answers to questions about rendered scenes.

  Raises:
    ValueError: there is no such file or list; see `answer_list`.
  """
  if path == "scenes":
    return [*asking.ANSWERS]
  if not files.exists(path):
    raise ValueError(
      f"answers: expected a file with one on each line, or a list such as "
      f"['yes', 'no'], found {os.fspath(path)!r}, which does not exist"
    )
  path = sources.annotation_file(path)
  try:
    text = files.read_bytes(path).decode("utf-8-sig")
    listed = (
      json.loads(text)
      if path.lower().endswith(".json")
      else [line.strip() for line in text.splitlines() if line.strip()]
    )
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f"{path}: expected a JSON list of answers, or lines of UTF-8 text with "
      f"one each: {error}"
    ) from error
  return answer_list(listed, path)
