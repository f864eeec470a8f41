"""Dialogs about images, from the rows of files.

The record of a row has, besides the image,

  context    text, the caption that the dialog starts from; "" if there is none
  dialog     its rounds, each a `Round`, in order
  dialog_id  how the file identifies it; the record's id if it does not
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from blip_jax.data import sources

# The keys of a row and of a round; those of a round are VisDial's.
DIALOG = "dialog"
CAPTION = "caption"
# The first name that a row has wins.
IDS = ("dialog_id", "image_id")
QUESTION, ANSWER = "question", "answer"
CANDIDATES, RIGHT = "answer_options", "gt_index"
RELEVANCE = "relevance"


class Round(NamedTuple):
  """A question about an image, and its answers.

  Attributes:
    question: text.
    answer: the answer that was given; "" if it is secret.
    candidates: answers to choose from; none if nobody has to choose here.
    right: number of the candidate that was given as the answer; None if that is
      secret.
    relevance: of each candidate, the share of annotators who find it right;
      none if they were not asked.
  """

  question: str
  answer: str = ""
  candidates: tuple[str, ...] = ()
  right: int | None = None
  relevance: tuple[float, ...] = ()


def check(columns: Collection[str], where: str) -> None:
  """Raises `ValueError` unless there is a column of dialogs."""
  if DIALOG not in columns:
    raise ValueError(
      f"{where}: expected a list of rounds under {DIALOG!r}, found "
      f"{list(columns)!r:.200}"
    )


def record(row: Mapping[str, Any], id: str, where: str) -> sources.Record:
  """Returns what a record has of the row's dialog.

  Raises:
    BadRow: there is no round or no question, a value has another type, the
      answer is not among the candidates, or no round has candidates.
  """
  context = row.get(CAPTION)
  if context is not None and not isinstance(context, str):
    raise _mistake(id, f"{where}: {CAPTION!r}", "text", context)
  listed = row.get(DIALOG)
  if not isinstance(listed, list) or not listed:
    raise _mistake(id, f"{where}: {DIALOG!r}", "a list of rounds", listed)
  rounds = tuple(
    _round(value, id, f"{where}: round {number + 1}")
    for number, value in enumerate(listed)
  )
  if not any(each.candidates for each in rounds):
    detail = f"{where}: expected {CANDIDATES!r} in a round, found none"
    raise sources.BadRow(id, "no_candidates", detail)
  found = sources.first_id(row, IDS)
  return {
    "context": context or "",
    "dialog": rounds,
    "dialog_id": id if found is None else found,
  }


def _round(value: Any, id: str, where: str) -> Round:
  if not isinstance(value, Mapping):
    raise _mistake(id, where, "an object", value)
  question, answer = value.get(QUESTION), value.get(ANSWER)
  if not isinstance(question, str) or not question.strip():
    detail = f"{where}: expected a question, found {question!r:.200}"
    raise sources.BadRow(id, "missing_question", detail)
  if answer is not None and not isinstance(answer, str):
    raise _mistake(id, f"{where}: {ANSWER!r}", "text", answer)
  candidates = _texts(value, CANDIDATES, id, where)
  relevance = _shares(value, RELEVANCE, len(candidates), id, where)
  right = _right(value, candidates, id, where)
  if not answer and right is not None:
    answer = candidates[right]
  return Round(question, answer or "", candidates, right, relevance)


def _right(
  value: Mapping[str, Any], candidates: Sequence[str], id: str, where: str
) -> int | None:
  """The number of the right candidate, which a round may give as text."""
  right, answer = value.get(RIGHT), value.get(ANSWER)
  if right is not None:
    is_number = isinstance(right, int) and not isinstance(right, bool)
    if not (is_number and 0 <= right < len(candidates)):
      expected = f"the number of one of {len(candidates)} candidates"
      raise _mistake(id, f"{where}: {RIGHT!r}", expected, right)
    return right
  if not candidates or not answer:
    return None
  if answer not in candidates:
    detail = (
      f"{where}: expected the answer {answer!r:.100} among the "
      f"{len(candidates)} {CANDIDATES!r}, or {RIGHT!r}"
    )
    raise sources.BadRow(id, "answer_not_listed", detail)
  return candidates.index(answer)


def _texts(
  value: Mapping[str, Any], name: str, id: str, where: str
) -> tuple[str, ...]:
  found = value.get(name)
  if found is None:
    return ()
  if not isinstance(found, list) or not all(isinstance(x, str) for x in found):
    raise _mistake(id, f"{where}: {name!r}", "a list of texts", found)
  return tuple(found)


def _shares(
  value: Mapping[str, Any], name: str, size: int, id: str, where: str
) -> tuple[float, ...]:
  found = value.get(name)
  if found is None:
    return ()
  is_list = isinstance(found, list) and len(found) == size
  if not is_list or not all(_is_share(x) for x in found):
    expected = f"a number from 0 to 1 for each of {size} candidates"
    raise _mistake(id, f"{where}: {name!r}", expected, found)
  return tuple(float(x) for x in found)


def _is_share(value: Any) -> bool:
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  return is_number and 0 <= value <= 1


def _mistake(id: str, where: str, expected: str, found: Any) -> sources.BadRow:
  detail = f"{where}: expected {expected}, found {found!r:.200}"
  return sources.BadRow(id, "broken_row", detail)
