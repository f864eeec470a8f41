"""Whole data sets in one JSON object: COCO's official files, and Karpathy's.

COCO's `captions_*.json` have `images`, and `annotations` that name their image.
Karpathy's `dataset_*.json` have `images` with their sentences and their split.
"""

import collections
import functools
import itertools
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from blip_jax.data import cells, grouped, json_index, offsets, schema, sources
from blip_jax.runtime import files

_Span = tuple[int, int]  # start and end in bytes
_NOWHERE = (0, 0)  # the span of an image that only annotations name


class JsonDataset(sources.Source):
  """Images of a data set, each with all its captions, in the file's order.

  The image is `file_name` (COCO), or `filename` in the folder `filepath`
  (Karpathy); its identity is `id`, or `cocoid` or `imgid`. Further columns are
  the keys of the image. See `schema.Columns` for the other arguments.

  Args:
    split: splits of Karpathy's file, joined by commas: "train,restval". COCO's
      files have none.
    needs_image: whether annotations of images that are not in `images` are
      lost. If not, each of these images follows, with its `image_id` alone.

  Raises:
    ValueError: on opening, if the file is no such object, is truncated, or has
      no such split.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    image_root: str = "",
    with_captions: bool = True,
    *,
    split: str | None = None,
    image: str | None = None,
    caption: str | None = None,
    keep: tuple[str, ...] = (),
    needs_image: bool = True,
  ):
    self.path = sources.annotation_file(path)
    self._columns = schema.Columns(
      os.fspath(image_root), with_captions, image, caption, keep, needs_image
    )
    self._split = split
    index, self.problems = offsets.cached(
      self.path,
      f"{'images' if needs_image else 'ids'}-{offsets.digest([split or ''])}",
      functools.partial(_index, split=split, needs_image=needs_image),
    )
    for line in self.problems:
      sources.warn_once(line)
    self._images = grouped.Grouped(self.path, index)
    schema.search(
      self._columns.check,
      lambda row: self._parse(row, ""),
      len(self),
      self.path,
    )

  def __len__(self) -> int:
    return len(self._images)

  def _id(self, index: int) -> str:
    number = self._images.number(index)
    return f"{files.printable(os.path.basename(self.path))}:{number}"

  def _record(self, index: int, id: str) -> sources.Record:
    number = self._images.number(index)
    row = self._parse(index, id)
    return self._columns.record(row, id, f"{self.path}: image {number}")

  def _parse(self, index: int, id: str) -> dict[str, Any]:
    where = f"{self.path}: image {self._images.number(index)}"
    first, *others = self._images[index]
    annotations = [_annotation(raw) for raw in others]
    try:
      image = _parsed(first) if first else {"id": _image_id(annotations)}
    except ValueError as error:
      raise sources.BadRow(id, "broken_row", f"{where}: {error}") from error
    if self._split and not isinstance(image.get("split"), str):
      detail = f"{where}: no 'split' among {list(image)!r:.200}"
      raise sources.BadRow(id, "broken_row", detail)
    return _row(image, annotations, self._columns.caption or "caption")


def _row(
  image: dict[str, Any], annotations: Sequence[dict[str, Any]], caption: str
) -> dict[str, Any]:
  """Returns the columns of an image and its annotations."""
  row = dict(image)
  if "id" in row:  # COCO's; Karpathy's have usual names
    row.setdefault("image_id", row.pop("id"))
  if isinstance(name := row.get("filename"), str):
    row["image"] = os.path.join(str(row.get("filepath", "")), name)
  if any(caption in annotation for annotation in annotations):
    texts = [annotation.get(caption) for annotation in annotations]
    # An annotation is a row of the file: one without text costs only itself.
    row[caption] = [text if isinstance(text, str) else None for text in texts]
  return row


def _annotation(raw: bytes) -> dict[str, Any]:
  """Parses an annotation; one that is broken is empty."""
  try:
    return _parsed(raw)
  except ValueError:
    return {}


def _image_id(annotations: Sequence[dict[str, Any]]) -> Any:
  ids = [annotation.get("image_id") for annotation in annotations]
  return next((id for id in ids if id is not None), None)


def _parsed(raw: bytes) -> dict[str, Any]:
  """Parses one element of a list; `ValueError` if it is no object."""
  try:
    row = json.loads(raw.decode("utf-8").rstrip().removesuffix(","))
  except RecursionError as error:
    raise ValueError(str(error)) from error
  if not isinstance(row, dict):
    raise ValueError(f"expected an object, found {row!r:.200}")
  return row


def _index(
  path: str, split: str | None, needs_image: bool
) -> tuple[grouped.Parts, list[str]]:
  """Finds the images of some splits, and the annotations of each."""
  found = json_index.lists(path)
  images = _spans(found.get("images"))
  if not images and (needs_image or "annotations" not in found):
    raise ValueError(
      f"{path}: expected a JSON list of rows, or an object with a list "
      f"'images' as COCO's and Karpathy's files have, found an object with "
      f"the lists {list(found)!r:.200}. Name a file with one row per line "
      ".jsonl."
    )
  data, _ = offsets.open_text(path)
  if "annotations" in found and split is None:
    annotations = _spans(found["annotations"])
    return _annotated(path, data, images, annotations, needs_image)
  rows = _of_splits(path, data, images, split)
  return grouped.parts(rows, [images[row] for row in rows]), []


def _annotated(
  path: str,
  data: np.ndarray,
  images: list[_Span],
  annotations: list[_Span],
  needs_image: bool,
) -> tuple[grouped.Parts, list[str]]:
  rows: dict[str, int] = {}
  for row, span in enumerate(images):
    if (key := _image_key(data, span, "id")) is not None:
      rows.setdefault(key, row)
  keys = [_image_key(data, span, "image_id") for span in annotations]
  spans = list(images)
  if not needs_image:
    for key in keys:
      if key is not None and key not in rows:
        rows[key] = len(spans)
        spans.append(_NOWHERE)
  of_image = [None if key is None else rows.get(key) for key in keys]
  numbers = list(range(len(spans)))
  for row, span in zip(of_image, annotations, strict=True):
    if row is not None:
      numbers.append(row)
      spans.append(span)
  lost = of_image.count(None)
  problems = [
    f"{path}: {lost} of {len(annotations)} annotations are of no image"
    + (" in 'images'" if needs_image else "")
  ]
  return grouped.parts(numbers, spans), problems if lost else []


def _of_splits(
  path: str, data: np.ndarray, images: list[_Span], split: str | None
) -> list[int]:
  """Returns the images of some splits; those without one cost their row."""
  found = [_value(data, span, "split") for span in images]
  found = [name if isinstance(name, str) else None for name in found]
  counts = collections.Counter(name for name in found if name is not None)
  if split is None and not counts:
    return list(range(len(images)))
  wanted = split.split(",") if split else []
  if not wanted or not counts.keys() >= set(wanted):
    sizes = ", ".join(f"{name} ({n} images)" for name, n in counts.items())
    raise ValueError(
      f"{path}: expected ?split=NAME or ?split=NAME,NAME with the names of "
      f"splits, found {split!r}. The file has {sizes or 'no splits'}."
    )
  return [
    row for row, name in enumerate(found) if name is None or name in wanted
  ]


def _spans(bounds: Int[np.ndarray, "offsets"] | None) -> list[_Span]:
  return [] if bounds is None else list(itertools.pairwise(bounds.tolist()))


def _value(data: np.ndarray, span: _Span, key: str) -> Any:
  """Returns a value of an element; None if it is unreadable."""
  if span[1] - span[0] > sources.MAX_ROW_BYTES:
    return None
  try:
    return _parsed(bytes(data[slice(*span)])).get(key)
  except ValueError:
    return None


def _image_key(data: np.ndarray, span: _Span, key: str) -> str | None:
  try:
    image_id = cells.image_id(_value(data, span, key), "", "")
  except sources.BadRow:
    return None
  return None if image_id is None else str(image_id)
