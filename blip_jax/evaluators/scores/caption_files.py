"""Reads the JSON files in which results are kept."""

import json
import os
from collections.abc import Iterator
from typing import Any

from blip_jax.data import sources
from blip_jax.evaluators.scores.image_names import Image
from blip_jax.runtime import files


def read_results(path: str | os.PathLike) -> dict[Image, str]:
  """Reads a caption for each image.

  A .jsonl is what the job `caption` writes: images that it could not read are
  left out, and an image of several rows has the caption of the first. Any other
  file has COCO's format, a list of `{"image_id": ..., "caption": ...}`; the
  path of the `image` may be added, or replace the id.

  Raises:
    ValueError: the file has another format, is empty, or has two captions of
      one image.
  """
  is_job = os.fspath(path).endswith(".jsonl")
  content = _parse_lines(path) if is_job else _parse(path)
  rows = [
    (row, _image(entry, path, row, is_job), _text(entry, path, row))
    for row, entry in _rows(content, path)
    if not (is_job and "error" in entry)
  ]
  captions = {}
  for same in sources.joined(image.keys for _, image, _ in rows):
    (first, _, caption), *others = [rows[n] for n in same]
    images = [rows[n][1] for n in same]
    ids = [image.image_id for image in images if image.image_id is not None]
    paths = [image.path for image in images if image.path]
    image = Image(ids[0] if ids else None, paths[0] if paths else "")
    if others and not is_job:
      raise ValueError(
        f"{path}: rows {first} and {others[0][0]} are both captions of image"
        f" {ids[0] if ids else image.path!r}; expected one caption per image."
        " Merge the results of several processes and drop padding first."
      )
    captions[image] = caption
  if not captions:
    raise ValueError(
      f"{path}: the list is empty; expected at least one caption."
    )
  return captions


def _parse(path: str | os.PathLike) -> Any:
  return _loads(_read(path), path)


def _parse_lines(path: str | os.PathLike) -> list[Any]:
  lines = (line for line in _read(path).split("\n") if line.strip())
  return [_loads(line, f"{path}: row {n}") for n, line in enumerate(lines)]


def _read(path: str | os.PathLike) -> str:
  try:
    return files.read_bytes(path).decode("utf-8-sig")
  except OSError as error:
    raise ValueError(f"{path}: {error.strerror}.") from error
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not UTF-8 (byte {error.start}).") from error


def _loads(text: str, where: str | os.PathLike) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(
      f"{where}: expected one JSON list or object: {error}. Is the file"
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


def _image(
  entry: dict, path: str | os.PathLike, row: int, is_job: bool
) -> Image:
  image_id = entry.get("image_id")
  if "image_id" in entry and (
    isinstance(image_id, bool) or not isinstance(image_id, int | str)
  ):
    raise ValueError(
      f"{path}: row {row}: expected a number or a string under 'image_id',"
      f" found {_brief(image_id)}."
    )
  name = entry.get("image")
  if name is None and image_id is None and is_job:
    name = entry.get("id")
  if not isinstance(name, str):
    if image_id is None:
      raise ValueError(
        f"{path}: row {row}: expected 'image_id', or a file name under"
        f" 'image'; found {_brief(entry)}."
      )
    name = ""
  elif not is_job:  # the job has already made names printable
    name = files.printable(name)
  if image_id is None or isinstance(image_id, str):
    # A name of COCO's contains the id, also under `image_id`.
    coco_id = sources.coco_image_id(name if image_id is None else image_id)
    image_id = image_id if coco_id is None else coco_id
  return Image(image_id, os.path.normpath(name) if name else "")


def _text(entry: dict, path: str | os.PathLike, row: int) -> str:
  caption = entry.get("caption")
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
