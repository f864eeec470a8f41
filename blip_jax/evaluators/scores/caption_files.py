"""Reads the JSON files in which results and reference captions are kept.

Images have the names of `image_names`.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

from blip_jax.evaluators.scores import image_names
from blip_jax.runtime import files

ImageId = image_names.ImageId

_IMAGE_KEYS = {"image_id", "image"}


def read_results(path: str | os.PathLike) -> dict[ImageId, str]:
  """Reads a caption for each image.

  A .jsonl is what the job `caption` writes: images that it could not read are
  left out, and an image of several rows has the caption of the first. Any other
  file has COCO's format, a list of `{"image_id": ..., "caption": ...}`.

  Raises:
    ValueError: the file has another format, is empty, or has two captions of
      one image.
  """
  is_job = os.fspath(path).endswith(".jsonl")
  content = _parse_lines(path) if is_job else _parse(path)
  captions, rows = {}, {}
  for row, entry in _rows(content, path):
    if is_job and "error" in entry:
      continue
    image = _image(entry, path, row, is_job)
    if image not in captions:
      captions[image] = _text(entry.get("caption"), path, row)
    elif not is_job:
      raise ValueError(
        f"{path}: rows {rows[image]} and {row} are both captions of image"
        f" {image[0]!r}; expected one caption per image. Merge the results of"
        " several processes and drop padding first."
      )
    rows.setdefault(image, row)
  if not captions:
    raise ValueError(
      f"{path}: the list is empty; expected at least one caption."
    )
  names = image_names.of_images([*captions])
  return dict(zip(names, captions.values(), strict=True))


def has_ids(path: str | os.PathLike) -> bool:
  """Whether results name images by `image_id`, and not by where they are."""
  if not os.fspath(path).endswith(".jsonl"):
    return True
  return any(
    "image_id" in entry for _, entry in _rows(_parse_lines(path), path)
  )


def read_paths(path: str | os.PathLike) -> dict[ImageId, str]:
  """Reads the paths of images with an id, from a file of references."""
  content = _parse(path)
  id_key, path_key = "image_id", "image"
  if isinstance(content, dict):
    content, id_key, path_key = content.get("images", []), "id", "file_name"
  return {
    image_names.from_id(entry[id_key]): files.printable(entry[path_key])
    for _, entry in _rows(content, path)
    if isinstance(entry.get(id_key), int | str)
    and isinstance(entry.get(path_key), str)
  }


def has_references(path: str | os.PathLike) -> bool:
  """Whether a file looks like one for `read_references`: a .json of COCO
  annotations, or of rows with the usual keys."""
  if not os.fspath(path).endswith(".json"):
    return False
  content = _parse(path)
  if isinstance(content, list) and content and isinstance(content[0], dict):
    return "caption" in content[0] and bool(content[0].keys() & _IMAGE_KEYS)
  return True


def read_references(path: str | os.PathLike) -> dict[ImageId, list[str]]:
  """Reads reference captions: COCO annotations or a Karpathy split.

  COCO annotations are an object with `annotations`, a list of `{"image_id":
  ..., "caption": ...}`. A Karpathy split is a list of `{"image": "a/b_12.jpg",
  "caption": [...]}`, where `caption` may also be one string, and an `image_id`
  takes precedence over the path. Rows of the same image are combined.

  Raises:
    ValueError: the file has another format.
  """
  content = _parse(path)
  if isinstance(content, dict):
    if "annotations" not in content:
      raise ValueError(
        f"{path}: expected COCO's 'annotations', found only the keys"
        f" {sorted(content)}."
      )
    content = content["annotations"]
  captions = {}
  for row, entry in _rows(content, path):
    texts = entry.get("caption")
    if not isinstance(texts, list):
      texts = [texts]
    captions.setdefault(_image(entry, path, row), []).extend(
      _text(text, path, row) for text in texts
    )
  names = image_names.of_images([*captions])
  return dict(zip(names, captions.values(), strict=True))


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
  entry: dict, path: str | os.PathLike, row: int, is_job: bool = False
) -> tuple[ImageId | None, str]:
  """The id of an image, or None and where it comes from."""
  if "image_id" in entry:
    image_id = entry["image_id"]
    if isinstance(image_id, bool) or not isinstance(image_id, int | str):
      raise ValueError(
        f"{path}: row {row}: expected a number or a string under 'image_id',"
        f" found {_brief(image_id)}."
      )
    return image_names.from_id(image_id), ""
  name = entry.get("image", entry.get("id") if is_job else None)
  if not isinstance(name, str):
    raise ValueError(
      f"{path}: row {row}: expected 'image_id', or a file name under"
      f" 'image'; found {_brief(entry)}."
    )
  # The job has already made names printable.
  return None, os.path.normpath(name if is_job else files.printable(name))


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
