"""Captions in the JSON files that the world keeps them in."""

import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

ImageId = int | str


def read_results(path: str | os.PathLike) -> dict[ImageId, str]:
  """Reads COCO results: a list of `{"image_id": ..., "caption": ...}`.

  Raises:
    ValueError: if it is no such file or holds nothing, or two captions of one
      image.
  """
  results, rows = {}, {}
  for row, entry in _rows(_parse(path), path):
    image_id = _image_id(entry, path, row)
    if image_id in rows:
      raise ValueError(
        f"{path}: rows {rows[image_id]} and {row} are both of image"
        f" {image_id!r}; expected one caption of each image. Results of several"
        " processes must be merged and padding be dropped before."
      )
    rows[image_id] = row
    results[image_id] = _text(entry.get("caption"), path, row)
  if not results:
    raise ValueError(f"{path}: the list is empty; expected a caption or more.")
  return results


def read_references(path: str | os.PathLike) -> dict[ImageId, list[str]]:
  """Reads COCO annotations or rows in Karpathy's manner.

  The former are an object with `annotations`, a list of `{"image_id": ...,
  "caption": ...}`. The latter are a list of `{"image": "a/b_12.jpg", "caption":
  [...]}`, where a single caption may stand without a list, and rows of the same
  image add up. Without `image_id`, the number at the end of the file's name is
  the id: 391895 of `val2014/COCO_val2014_000000391895.jpg`.

  Raises:
    ValueError: if it is no such file, or if two files have the same number.
  """
  content = _parse(path)
  if isinstance(content, dict):
    if "annotations" not in content:
      raise ValueError(
        f"{path}: expected COCO's 'annotations', found only the keys"
        f" {sorted(content)}."
      )
    content = content["annotations"]
  references, files = {}, {}
  for row, entry in _rows(content, path):
    image_id = _image_id(entry, path, row)
    if "image_id" not in entry:
      file = entry["image"]
      if files.setdefault(image_id, file) != file:
        raise ValueError(
          f"{path}: row {row}: {file!r} ends with the same number as"
          f" {files[image_id]!r}; give the rows an 'image_id'."
        )
    captions = entry.get("caption")
    if not isinstance(captions, list):
      captions = [captions]
    references.setdefault(image_id, []).extend(
      _text(caption, path, row) for caption in captions
    )
  return references


def _parse(path: str | os.PathLike) -> Any:
  try:
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
  except OSError as error:
    raise ValueError(f"{path}: {error.strerror}.") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not UTF-8 (byte {error.start}).") from error
  except (json.JSONDecodeError, RecursionError) as error:
    raise ValueError(
      f"{path}: expected one JSON list or object: {error}. Is the file whole?"
    ) from error


def _rows(content: Any, path: str | os.PathLike) -> Iterator[tuple[int, dict]]:
  if not isinstance(content, list):
    raise ValueError(
      f"{path}: expected a list of objects with 'image_id' and 'caption', found"
      f" {_brief(content)}."
    )
  for row, entry in enumerate(content):
    if not isinstance(entry, dict):
      raise ValueError(
        f"{path}: row {row}: expected an object with 'image_id' and 'caption',"
        f" found {_brief(entry)}."
      )
    yield row, entry


def _image_id(entry: dict, path: str | os.PathLike, row: int) -> ImageId:
  """The id; a number also where it is written as text, "391895"."""
  if "image_id" not in entry:
    return _number(entry, path, row)
  image_id = entry["image_id"]
  if isinstance(image_id, bool) or not isinstance(image_id, int | str):
    raise ValueError(
      f"{path}: row {row}: expected a number or a text under 'image_id', found"
      f" {_brief(image_id)}."
    )
  if isinstance(image_id, str) and image_id.isdecimal():
    return int(image_id)
  return image_id


def _number(entry: dict, path: str | os.PathLike, row: int) -> int:
  file = entry.get("image")
  if not isinstance(file, str):
    raise ValueError(
      f"{path}: row {row}: expected 'image_id', or a file's name under"
      f" 'image'; found {_brief(entry)}."
    )
  if not (number := re.search(r"([0-9]+)(\.\w+)?$", file)):
    raise ValueError(
      f"{path}: row {row}: there is no number at the end of {file!r}; give the"
      " rows an 'image_id'."
    )
  return int(number[1])


def _text(caption: Any, path: str | os.PathLike, row: int) -> str:
  if not isinstance(caption, str):
    raise ValueError(
      f"{path}: row {row}: expected text under 'caption', found"
      f" {_brief(caption)}."
    )
  return caption


def _brief(value: Any) -> str:
  """What was found, with the keys of an object instead of its values."""
  if isinstance(value, dict):
    return f"an object with the keys {sorted(value)}"
  return f"{type(value).__name__} {value!r:.80}"
