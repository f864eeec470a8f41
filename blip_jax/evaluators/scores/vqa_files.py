"""The JSON files of VQA: answers as servers read them, and annotations."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from blip_jax.data import questions, sources
from blip_jax.evaluators.scores import vqa_accuracy
from blip_jax.runtime import files

# Of a file of answers, as the server of each data set reads it.
FORMATS = ("vqa", "aokvqa", "gqa", "vizwiz")
# COCO's images of these splits are in the original's training data.
TRAINED_ON = ("train2014", "val2014")

_IDS = (*questions.IDS, "image")
_ANSWERS = ("answer", "prediction")


def formatted(
  answers: Sequence[tuple[sources.Record, str]],
  format: str,
) -> list[dict[str, Any]] | dict[str, Any]:
  """Returns answers as a server reads them.

  Args:
    answers: of different questions; their records, and the answers.
    format: one of `FORMATS`.
  """
  if format == "vqa":
    return [
      {"question_id": record["question_id"], "answer": answer}
      for record, answer in answers
    ]
  if format == "gqa":
    return [
      {"questionId": str(record["question_id"]), "prediction": answer}
      for record, answer in answers
    ]
  if format == "vizwiz":
    return [
      {
        "image": os.path.basename(sources.image_path(record)),
        "answer": answer,
      }
      for record, answer in answers
    ]
  return {
    str(record["question_id"]): {"direct_answer": answer}
    for record, answer in answers
  }


def read_results(path: str | os.PathLike) -> dict[Any, str]:
  """Reads answers by the ids of their questions, in any of `FORMATS`.

  Lines of the job `answer` (.jsonl) are read too; those of rows that could not
  be answered are left out.

  Raises:
    ValueError: the file has another format, or two answers of a question.
  """
  content = _read(path)
  if isinstance(content, dict):
    content = [
      {"question_id": id, "answer": _direct(value)}
      for id, value in content.items()
    ]
  answers: dict[Any, str] = {}
  for row, entry in enumerate(_rows(content, path)):
    if "error" in entry:
      continue
    id = sources.first_id(entry, _IDS)
    answer = next((entry[name] for name in _ANSWERS if name in entry), None)
    if id is None or not isinstance(answer, str):
      raise ValueError(
        f"{path}: row {row}: expected a 'question_id' and an 'answer', found "
        f"{entry!r:.200}"
      )
    if id in answers:
      raise ValueError(
        f"{path}: row {row} is a second answer to question {id!r}; expected "
        "one of each"
      )
    answers[id] = answer
  if not answers:
    raise ValueError(f"{path}: expected at least one answer, found none")
  return answers


def read_annotations(
  path: str | os.PathLike,
) -> tuple[dict[Any, vqa_accuracy.Question], str, int]:
  """Reads the annotators' answers by the ids of the questions.

  The file is VQA's, with a list `annotations`, a list of such rows (BLIP's,
  A-OKVQA's, VizWiz's), or GQA's object.

  Returns:
    The questions, the name of the split ("val2014"; "" if the file has none),
    and the number of rows without a usable answer.

  Raises:
    ValueError: the file has another format, or no answers.
  """
  content = _read(path)
  split = ""
  if isinstance(content, dict):
    split = str(content.get("data_subtype", ""))
    content = content.get("annotations") or [
      {"question_id": id, **row}
      for id, row in content.items()
      if isinstance(row, dict)
    ]
  found: dict[Any, vqa_accuracy.Question] = {}
  num_bad = 0
  for row, entry in enumerate(_rows(content, path)):
    where = f"{path}: row {row}"
    id = sources.first_id(entry, _IDS)
    try:
      answers = questions.answers(entry, "", where)
    except sources.BadRow:
      answers = []
    if id is None or not answers:
      num_bad += 1
      continue
    found[id] = vqa_accuracy.Question(answers, **questions.types(entry))
  if not found:
    raise ValueError(f"{path}: expected answers of questions, found none")
  return found, split, num_bad


def _direct(value: Any) -> Any:
  return value.get("direct_answer") if isinstance(value, Mapping) else value


def _read(path: str | os.PathLike) -> Any:
  path = sources.annotation_file(path)
  try:
    text = files.read_bytes(path).decode("utf-8-sig")
    if path.lower().endswith(".jsonl"):
      return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: expected JSON: {error}") from error


def _rows(content: Any, path: str | os.PathLike) -> list[dict[str, Any]]:
  if not isinstance(content, list) or not all(
    isinstance(row, dict) for row in content
  ):
    raise ValueError(f"{path}: expected a list of objects, found another value")
  return content
