"""VisDial's official files: dialogs whose texts are numbers in two lists.

They are {split, data: {questions, answers, dialogs}}. Dense annotations, which
have the relevance of all candidates in some rounds, are a file of their own.
"""

import functools
import itertools
import json
import os
import re
from typing import Any

import numpy as np

from blip_jax.data import dialogs, json_index, offsets, schema, sources
from blip_jax.runtime import files

_LISTS = ("questions", "answers", "dialogs")
# The name of the split is next to the lists, which are nearly all of the file.
_SPLIT = re.compile(rb'"split"\s*:\s*"(\w+)"')
_ENDS = 1 << 12
_ENDING, _DENSE = ".json", "_dense_annotations.json"
# Those of VisDial itself, and those of COCO, which has images of "train" in two
# folders.
_OWN_IMAGES = "VisualDialog_{0}/VisualDialog_{0}_{{image_id:012}}.jpg"
_COCO_IMAGES = "{0}/COCO_{0}_{{image_id:012}}.jpg"
_COCO_SPLITS = ("train2014", "val2014")


class DialogFiles(sources.Source):
  """Dialogs of VisDial.

  Args:
    path: the dialogs.
    dense: the file with their dense annotations. None: the one of the official
      name next to the dialogs, "visdial_1.0_val_dense_annotations.json", if
      there is one.
    image_file: the path of an image by its id, see `schema.Columns`; "": that
      of the official archives, "VisualDialog_val2018/" and so on, and for
      training whichever exists in COCO's "train2014/" and "val2014/".

  Raises:
    ValueError: on opening, if a file is none of these, or not one dense
      annotation is of a dialog.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    image_root: str = "",
    with_captions: bool = False,
    *,
    dense: str | None = None,
    image_file: str = "",
    with_dialogs: bool = True,
  ):
    self.path = sources.annotation_file(path)
    spans = offsets.cached(self.path, "dialogs", _index)[0]
    # Two of texts, then one of each dialog.
    self._questions = _Texts(self.path, *spans[0].tolist())
    self._answers = _Texts(self.path, *spans[1].tolist())
    self._spans = offsets.Mapped(spans)
    names = [image_file] if image_file else _official_names(self.path)
    self._columns = [
      schema.Columns(
        os.fspath(image_root),
        with_captions,
        image_file=name,
        with_dialogs=with_dialogs,
      )
      for name in names
    ]
    self._dense = _dense(self.path, dense)
    schema.search(
      self._columns[0].check,
      lambda row: self._parse(row, ""),
      len(self),
      self.path,
    )
    if self._dense and dense and not self._has_dense():
      raise ValueError(
        f"{dense}: none of its annotations has the image_id of a dialog in "
        f"{self.path}; the two files do not belong together"
      )

  def __len__(self) -> int:
    return len(self._spans.array) - 2

  def _id(self, index: int) -> str:
    return f"{files.printable(os.path.basename(self.path))}:{index}"

  def _record(self, index: int, id: str) -> sources.Record:
    row = self._parse(index, id)
    for columns in self._columns:
      record = columns.record(row, id, self._where(index))
      if len(self._columns) == 1 or files.exists(record["image"]):
        break
    return record

  def _where(self, index: int) -> str:
    return f"{self.path}: dialog {index}"

  def _parse(self, index: int, id: str) -> dict[str, Any]:
    """A row with texts in place of numbers."""
    start, end = self._spans.array[index + 2].tolist()
    raw = sources.read_row(self.path, start, end - start)
    try:
      row = _parsed(raw)
      if isinstance(row.get(dialogs.DIALOG), list):
        row[dialogs.DIALOG] = [
          self._round(value, row.get("image_id"), number)
          for number, value in enumerate(row[dialogs.DIALOG], 1)
        ]
    except ValueError as error:
      detail = f"{self._where(index)}: {error}"
      raise sources.BadRow(id, "broken_row", detail) from error
    return row

  def _round(self, value: Any, image_id: Any, number: int) -> Any:
    if not isinstance(value, dict):
      return value  # which `dialogs` refuses
    value = dict(value)
    for name, texts in (
      (dialogs.QUESTION, self._questions),
      (dialogs.ANSWER, self._answers),
    ):
      if value.get(name) is not None:
        value[name] = texts[value[name]]
    listed = value.get(dialogs.CANDIDATES)
    if isinstance(listed, list):
      value[dialogs.CANDIDATES] = [self._answers[n] for n in listed]
    relevance = self._dense.get((image_id, number))
    return value if relevance is None else value | {"relevance": relevance}

  def _has_dense(self) -> bool:
    known = {image_id for image_id, _ in self._dense}
    for index in range(len(self)):
      try:
        if self._parse(index, "").get("image_id") in known:
          return True
      except sources.BadRow:
        continue
    return False


class _Texts:
  """A list of texts in a file, which is read when the first is needed.

  Pickled without them, for they would be copied into every worker process.
  """

  def __init__(self, path: str, start: int, end: int):
    self._path, self._start, self._end = path, start, end

  @functools.cached_property
  def _texts(self) -> list[Any]:
    raw = files.read_range(self._path, self._start, self._end - self._start)
    return json.loads(f"[{raw.decode('utf-8').strip().removesuffix(',')}]")

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != "_texts"}

  def __getitem__(self, number: Any) -> str:
    """Returns a text; `ValueError` if it has no such number."""
    is_number = isinstance(number, int) and not isinstance(number, bool)
    if not (is_number and 0 <= number < len(self._texts)):
      raise ValueError(
        f"expected the number of one of {len(self._texts)} texts, found "
        f"{number!r:.100}"
      )
    text = self._texts[number]
    if not isinstance(text, str):
      raise ValueError(f"text {number}: expected a text, found {text!r:.100}")
    return text


def _index(path: str) -> tuple[np.ndarray, list[str]]:
  """Start and end, in bytes, of the two lists of texts and of each dialog."""
  lists = json_index.lists(path, depth=3)
  if missing := [name for name in _LISTS if name not in lists]:
    raise ValueError(
      f"{path}: expected an object whose 'data' has the lists {_LISTS}, as "
      f"VisDial's files have, found no {missing}"
    )
  questions, answers, rows = (lists[name] for name in _LISTS)
  if len(rows) < 2:
    raise ValueError(f"{path}: expected dialogs, found none")
  texts = [(bounds[0], bounds[-1]) for bounds in (questions, answers)]
  return np.array([*texts, *itertools.pairwise(rows)]), []


def _official_names(path: str) -> list[str]:
  """The paths of the images of a file, of which one exists."""
  size = files.size(path)
  ends = files.read_range(path, 0, _ENDS) + files.read_range(
    path, max(size - _ENDS, 0), _ENDS
  )
  match = _SPLIT.search(ends)
  if not match:
    raise ValueError(
      f"{path}: there is no 'split', by which image files are found; name them "
      "with ?image_file=FOLDER/{image_id:012}.jpg"
    )
  split = match[1].decode()
  if split.startswith(("val2018", "test2018")):
    return [_OWN_IMAGES.format(split)]
  return [_COCO_IMAGES.format(name) for name in _COCO_SPLITS]


def _dense(path: str, given: str | None) -> dict[tuple[Any, int], list[Any]]:
  """The relevance of candidates, by image and number of the round."""
  if given is None:
    given = path.removesuffix(_ENDING) + _DENSE
    if not files.is_file(given):
      return {}
  found = files.read_json(sources.annotation_file(given))
  try:
    # "gt_relevance" in the file for validation.
    return {
      (each["image_id"], each["round_id"]): (
        each["gt_relevance"] if "gt_relevance" in each else each["relevance"]
      )
      for each in found
    }
  except (KeyError, TypeError) as error:
    raise ValueError(
      f"{given}: expected a list of objects with 'image_id', 'round_id' and "
      f"'gt_relevance' or 'relevance': {type(error).__name__} {error}"
    ) from error


def _parsed(raw: bytes) -> dict[str, Any]:
  try:
    row = json.loads(raw.decode("utf-8").strip().removesuffix(","))
  except RecursionError as error:
    raise ValueError(str(error)) from error
  if not isinstance(row, dict):
    raise ValueError(f"expected an object, found {row!r:.200}")
  return row
