"""Reads the JSON files in which results and reference captions are kept."""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

from blip_jax.runtime import files

ImageId = int | str


def read_results(path: str | os.PathLike) -> dict[ImageId, str]:
  """Reads COCO results: a list of `{"image_id": ..., "caption": ...}`.

  Raises:
    ValueError: the file has another format, is empty, or has two captions of
      one image.
  """
  results, rows = {}, {}
  for row, entry in _rows(_parse(path), path):
    image_id = _image_id(entry, path, row)
    if image_id in rows:
      raise ValueError(
        f"{path}: rows {rows[image_id]} and {row} are both captions of image"
        f" {image_id!r}; expected one caption per image. Merge the results of"
        " several processes and drop padding first."
      )
    rows[image_id] = row
    results[image_id] = _text(entry.get("caption"), path, row)
  if not results:
    raise ValueError(
      f"{path}: the list is empty; expected at least one caption."
    )
  return results


def read_references(path: str | os.PathLike) -> dict[ImageId, list[str]]:
  """Reads reference captions: COCO annotations or a Karpathy split.

  COCO annotations are an object with `annotations`, a list of `{"image_id":
  ..., "caption": ...}`. A Karpathy split is a list of `{"image": "a/b_12.jpg",
  "caption": [...]}`, where `caption` may also be one string, and rows of the
  same image are combined. Without `image_id`, the id is the number at the end
  of the file name: 391895 for `val2014/COCO_val2014_000000391895.jpg`.

  Raises:
    ValueError: the file has another format, or two images have the same number.
  """
  content = _parse(path)
  if isinstance(content, dict):
    if "annotations" not in content:
      raise ValueError(
        f"{path}: expected COCO's 'annotations', found only the keys"
        f" {sorted(content)}."
      )
    content = content["annotations"]
  references, names = {}, {}
  for row, entry in _rows(content, path):
    image_id = _image_id(entry, path, row)
    if "image_id" not in entry:
      name = entry["image"]
      if names.setdefault(image_id, name) != name:
        raise ValueError(
          f"{path}: row {row}: {name!r} ends with the same number as"
          f" {names[image_id]!r}; give the rows an 'image_id'."
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
    return json.loads(files.read_bytes(path).decode("utf-8-sig"))
  except OSError as error:
    raise ValueError(f"{path}: {error.strerror}.") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not UTF-8 (byte {error.start}).") from error
  except (json.JSONDecodeError, RecursionError) as error:
    raise ValueError(
      f"{path}: expected one JSON list or object: {error}. Is the file"
      " complete?"
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
  """The id; a decimal string, such as "391895", becomes a number."""
  if "image_id" not in entry:
    return _number(entry, path, row)
  image_id = entry["image_id"]
  if isinstance(image_id, bool) or not isinstance(image_id, int | str):
    raise ValueError(
      f"{path}: row {row}: expected a number or a string under 'image_id',"
      f" found {_brief(image_id)}."
    )
  if isinstance(image_id, str) and image_id.isdecimal():
    return int(image_id)
  return image_id


def _number(entry: dict, path: str | os.PathLike, row: int) -> int:
  name = entry.get("image")
  if not isinstance(name, str):
    raise ValueError(
      f"{path}: row {row}: expected 'image_id', or a file name under"
      f" 'image'; found {_brief(entry)}."
    )
  if not (number := re.search(r"([0-9]+)(\.\w+)?$", name)):
    raise ValueError(
      f"{path}: row {row}: there is no number at the end of {name!r}; give the"
      " rows an 'image_id'."
    )
  return int(number[1])


def _text(caption: Any, path: str | os.PathLike, row: int) -> str:
  if not isinstance(caption, str):
    raise ValueError(
      f"{path}: row {row}: expected a string under 'caption', found"
      f" {_brief(caption)}."
    )
  return caption


def _brief(value: Any) -> str:
  """A short description of a JSON value; of an object, its keys."""
  if isinstance(value, dict):
    return f"an object with the keys {sorted(value)}"
  return f"{type(value).__name__} {value!r:.80}"
