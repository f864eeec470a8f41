"""The official files of VQA and of GQA: questions in one JSON object.

VQA's `*_questions.json` have a list `questions`, and its `*_annotations.json` a
list `annotations` with their answers; OK-VQA's are the same. `question_id`
joins them. GQA's `*_questions.json` are an object whose keys are the ids.
"""

import json
import os
import re
from typing import Any

import numpy as np
from jaxtyping import Int

from blip_jax.data import json_index, schema, sources, transforms
from blip_jax.runtime import files

_Spans = Int[np.ndarray, "n 2"]  # start and end in bytes
# The name of the split is next to the list, which is nearly all of the file.
_SUBTYPE = re.compile(rb'"data_subtype"\s*:\s*"(?:test-dev(\d+)|([\w-]+))"')
_ENDS = 1 << 12
_QUESTIONS = "_questions.json"


class QuestionFiles(sources.Source):
  """Questions of VQA, OK-VQA or GQA, with answers if there are any.

  Args:
    path: the questions.
    annotations: the file with their answers. None: the one of the official
      name next to the questions, "v2_mscoco_val2014_annotations.json"; if there
      is none, the questions have answers (GQA), or they are secret.
    image_file: the path of an image by its id, see `schema.Columns`; "": that
      of the official archives, "train2014/COCO_train2014_000000000009.jpg" or
      "2370799.jpg".

  Raises:
    ValueError: on opening, if a file is none of these, or not one question has
      an annotation.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    image_root: str = "",
    with_captions: bool = False,
    *,
    annotations: str | None = None,
    image_file: str = "",
    with_questions: bool = True,
  ):
    self.path = sources.annotation_file(path)
    self._annotations_path = _official_annotations(self.path)
    if annotations:
      self._annotations_path = sources.annotation_file(annotations)
    lists = json_index.lists(self.path)
    if "annotations" in lists:
      raise ValueError(
        f"{self.path}: these are annotations; name the file of the questions, "
        "FILE?annotations=THIS"
      )
    self._keyed = "questions" not in lists
    bounds = json_index.object_rows(self.path) if self._keyed else None
    self._questions = _spans(lists["questions"] if bounds is None else bounds)
    self._columns = schema.Columns(
      os.fspath(image_root),
      with_captions,
      with_questions=with_questions,
      image_file=image_file or self._official_name(),
    )
    self._annotations: _Spans | None = None
    if self._annotations_path:
      self._annotations = self._joined(self._annotations_path)
    schema.search(
      self._columns.check,
      lambda row: self._parse(row, ""),
      len(self),
      self.path,
    )

  def __len__(self) -> int:
    return len(self._questions)

  def _official_name(self) -> str:
    if self._keyed:
      return "{image_id}.jpg"
    size = files.size(self.path)
    ends = files.read_range(self.path, 0, _ENDS) + files.read_range(
      self.path, max(size - _ENDS, 0), _ENDS
    )
    match = _SUBTYPE.search(ends)
    if not match:
      raise ValueError(
        f"{self.path}: there is no 'data_subtype', by which image files are "
        "found; name them with ?image_file=FOLDER/{image_id:012}.jpg"
      )
    split = b"test" + match[1] if match[1] else match[2]
    name = split.decode()
    return f"{name}/COCO_{name}_{{image_id:012}}.jpg"

  def _joined(self, path: str) -> _Spans:
    """Finds the annotation of each question; an empty span if it has none."""
    bounds = json_index.lists(path).get("annotations")
    if bounds is None:
      raise ValueError(
        f"{path}: expected an object with a list 'annotations', as VQA's have"
      )
    spans = _spans(bounds)
    place = {}
    for n, span in enumerate(spans.tolist()):
      place.setdefault(_id(path, span), n)
    ids = [_id(self.path, span) for span in self._questions.tolist()]
    found = np.array([-1 if id is None else place.get(id, -1) for id in ids])
    num_found = int((found >= 0).sum())
    if not num_found:
      raise ValueError(
        f"{path}: none of its {len(spans)} annotations has the question_id of "
        f"one of the {len(ids)} questions in {self.path}; the two files do not "
        "belong together"
      )
    if num_found < max(len(ids), len(spans)):
      sources.warn_once(
        f"{self.path}: {len(ids) - num_found} of {len(ids)} questions have no "
        f"annotation in {path}, and {len(spans) - num_found} of {len(spans)} "
        "annotations are of no question"
      )
    return np.where(found[:, None] >= 0, spans[found], 0)

  def _id(self, index: int) -> str:
    return f"{files.printable(os.path.basename(self.path))}:{index}"

  def _record(self, index: int, id: str) -> sources.Record:
    row = self._parse(index, id)
    return self._columns.record(row, id, f"{self.path}: question {index}")

  def _parse(self, index: int, id: str) -> dict[str, Any]:
    where = f"{self.path}: question {index}"
    try:
      row = _parsed(self.path, self._questions[index].tolist(), self._keyed)
      if self._annotations_path and self._annotations is not None:
        span = self._annotations[index].tolist()
        if span[1]:
          row = _parsed(self._annotations_path, span) | row
    except ValueError as error:
      raise sources.BadRow(id, "broken_row", f"{where}: {error}") from error
    return row


def _official_annotations(path: str) -> str:
  """The annotations next to a file of VQA's questions; "" if there are none."""
  folder, name = os.path.split(path)
  if not name.endswith(_QUESTIONS):
    return ""
  stem = name.removesuffix(_QUESTIONS).replace("OpenEnded_", "", 1)
  found = os.path.join(folder, f"{stem}_annotations.json")
  return found if files.is_file(found) else ""


def _spans(bounds: Int[np.ndarray, "offsets"]) -> _Spans:
  return np.stack([bounds[:-1], bounds[1:]], axis=1)


def _id(path: str, span: list[int]) -> Any:
  """The `question_id` of an element; None if it is unreadable."""
  try:
    id = _parsed(path, span).get("question_id")
  except (ValueError, transforms.BadSample):
    return None
  return id if isinstance(id, (int, str)) else None


def _parsed(path: str, span: list[int], keyed: bool = False) -> dict[str, Any]:
  """Parses an element of a list, or a member of an object with its key."""
  start, end = span
  raw = sources.read_row(path, start, end - start)
  text = raw.decode("utf-8").strip().removesuffix(",")
  try:
    row = json.loads("{" + text + "}" if keyed else text)
  except RecursionError as error:
    raise ValueError(str(error)) from error
  if keyed and len(row) == 1:
    ((key, row),) = row.items()
    row = {"question_id": key, **row} if isinstance(row, dict) else row
  if not isinstance(row, dict):
    raise ValueError(f"expected an object, found {row!r:.200}")
  return row
