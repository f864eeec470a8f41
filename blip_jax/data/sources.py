"""Random access to image-text pairs, wherever they lie.

A source has `len()`, can be pickled, and gives by index a record:

  image     encoded bytes, the path of a file, or a uint8 array H W 3
  caption   str, list of str, or undecoded bytes
  image_id  what the annotation calls the picture; absent if it says nothing
  id        where the record came from, for reports: "train.json:17"

A mistake in the schema (a key that is missing) is the user's and raises
`ValueError`. A single unreadable row raises `BadRow`, which the loader counts
and skips; pictures are only looked at later, in `transforms.decode`.
"""

import bisect
import concurrent.futures
import itertools
import json
import os
import urllib.parse
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from blip_jax.data import offsets, transforms

Record = dict[str, Any]

# Shards are indexed by this many threads: on network storage each header is
# a round trip.
_INDEX_THREADS = 16

# First match wins, among the features of a TFDS builder.
_TFDS_CAPTIONS = ("caption", "captions", "text", "texts", "sentences")
_TFDS_IMAGE_IDS = ("image_id", "image/id", "image/filename")


class BadRow(transforms.BadSample):
  """A row that is unreadable although its neighbours are not."""

  def __init__(self, id: str, reason: str, detail: str):
    super().__init__(reason, detail)
    self.args = (id, reason, detail)  # what unpickling passes
    self.id = id


class Annotations:
  """Rows of a JSON list or of JSON lines, as COCO, Flickr30k and BLIP use.

  A row is an object with `caption` (str, or a list of them) and `image`, a
  path relative to `image_root` (an absolute path stays as it is). The
  filtered sets released with BLIP have `url` instead of `image`: see
  `path_of_url` for where such a picture is expected. `image_id` is passed on.

  Raises:
    ValueError: on opening, if the file is no list of rows or is truncated; on
      access, if a row lacks a key or has another type there. Both name the
      file, the row (from 0) and the key.
  """

  def __init__(self, path: str | os.PathLike, image_root: str = ""):
    self.path = os.fspath(path)
    if not os.path.isfile(self.path):
      raise ValueError(f"{self.path}: no such annotation file.")
    find = offsets.jsonl_rows if _is_jsonl(self.path) else offsets.json_rows
    self._image_root = os.fspath(image_root)
    self._rows = offsets.Mapped(offsets.cached(self.path, "rows", find)[0])

  def __len__(self) -> int:
    return len(self._rows.array) - 1

  def __getitem__(self, index: int) -> Record:
    index = range(len(self))[index]
    id = f"{os.path.basename(self.path)}:{index}"
    row = self._parse(index, id)
    record = {
      "image": self._image_path(row, index, id),
      "caption": self._caption(row, index, id),
      "id": id,
    }
    if "image_id" in row:
      record["image_id"] = row["image_id"]
    return record

  def _parse(self, index: int, id: str) -> dict[str, Any]:
    start, end = (int(n) for n in self._rows.array[index : index + 2])
    raw = offsets.read_span(self.path, start, end - start)
    try:
      row = json.loads(raw.decode("utf-8").rstrip().removesuffix(","))
    except (ValueError, RecursionError) as error:  # ValueError: also UTF-8
      detail = f"{self.path}: row {index} (byte {start}): {error}"
      raise BadRow(id, "broken_row", detail) from error
    if not isinstance(row, dict):
      raise self._mistake(index, "an object", row)
    return row

  def _image_path(self, row: dict, index: int, id: str) -> str:
    image = row.get("image", row.get("url"))
    if not isinstance(image, str):
      found = image if image is not None else sorted(row)
      raise self._mistake(index, "a path under 'image' (or 'url')", found)
    if image.startswith(("http://", "https://")):
      try:
        image = path_of_url(image)
      except ValueError as error:
        raise BadRow(id, "broken_row", f"{self.path}: {error}") from error
    return os.path.join(self._image_root, image)

  def _caption(self, row: dict, index: int, id: str) -> str | list[str]:
    if "caption" not in row:
      raise self._mistake(index, "the key 'caption'", sorted(row))
    caption = row["caption"]
    if caption is None or caption == []:  # usual in files scraped from the web
      raise BadRow(id, "empty_caption", f"{self.path}: row {index}: {caption}")
    texts = caption if isinstance(caption, list) else [caption]
    if not all(isinstance(text, str) for text in texts):
      raise self._mistake(index, "text under 'caption'", caption)
    return caption

  def _mistake(self, index: int, expected: str, found: Any) -> ValueError:
    return ValueError(
      f"{self.path}: row {index}: expected {expected}, found {found!r:.200}."
    )


def _is_jsonl(path: str) -> bool:
  return path.endswith(".jsonl")


def path_of_url(url: str) -> str:
  """Return where a picture lies that was downloaded by its URL.

  The rule is that of `wget --force-directories`: host, decoded path, "?" and
  query. "https://a.org/x/b%20c.jpg?w=1" lies at "a.org/x/b c.jpg?w=1".

  Raises:
    ValueError: the URL would lead out of the image root.
  """
  parts = urllib.parse.urlsplit(url)
  path = urllib.parse.unquote(parts.path)
  if ".." in path.split("/") or not parts.netloc or "\0" in path:
    raise ValueError(f"no file can be derived from the URL {url!r:.200}")
  if path.endswith("/") or not path:
    path = path.rstrip("/") + "/index.html"
  return parts.netloc + path + ("?" + parts.query if parts.query else "")


class TarShards:
  """Samples of webdataset or img2dataset tar files, read where they lie.

  A sample is made of the members that share a name up to its first dot: a
  picture (jpg, jpeg, png, webp) and its caption (txt, or the key "caption" of
  json). Nothing is extracted, and members of other kinds are never opened.

  `problems` lists what is damaged in which shard; the samples around it stay.
  """

  def __init__(self, paths: Sequence[str]):
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing or not paths:
      raise ValueError(
        f"{len(missing)} of {len(paths)} shards do not exist: {missing[:3]}. "
        "A pattern with '*' takes those that are there."
      )
    self.paths = tuple(paths)
    with concurrent.futures.ThreadPoolExecutor(_INDEX_THREADS) as pool:
      found = list(pool.map(_tar_index, self.paths))
    self._shards = [offsets.Mapped(index) for index, _ in found]
    self._ends = list(itertools.accumulate(len(index) for index, _ in found))
    self.problems = [line for _, damage in found for line in damage]
    for line in self.problems:
      logging.warning("Damaged shard: %s", line)
    if not len(self):
      raise ValueError(f"No samples in {paths[0]} and {len(paths) - 1} others.")

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: int) -> Record:
    index = range(len(self))[index]
    shard = bisect.bisect_right(self._ends, index)
    rows = self._shards[shard].array
    sample = rows[index - self._ends[shard]]  # counted from the shard's end
    path = self.paths[shard]
    id = f"{os.path.basename(path)}:{os.fsdecode(bytes(sample['key']))}"
    return {
      "image": _member(path, sample["image"], id, "image"),
      "caption": _tar_caption(path, sample, id),
      "id": id,
    }


def _tar_index(path: str) -> tuple[np.ndarray, list[str]]:
  return offsets.cached(path, "samples", offsets.tar_samples)


def _tar_caption(path: str, sample: np.void, id: str) -> str | bytes:
  if sample["text"][0] >= 0 or sample["json"][0] < 0:
    return _member(path, sample["text"], id, "caption")
  raw = _member(path, sample["json"], id, "caption")
  try:
    caption = json.loads(raw.decode("utf-8"))["caption"]
  except (ValueError, RecursionError, KeyError, TypeError) as error:
    raise BadRow(id, "broken_row", f"{path}: json: {error!r}") from error
  if not isinstance(caption, str):
    raise BadRow(id, "empty_caption", f"{path}: json: {caption!r:.200}")
  return caption


def _member(path: str, span: np.ndarray, id: str, part: str) -> bytes:
  offset, size = (int(n) for n in span)
  if offset < 0:
    raise BadRow(id, f"missing_{part}", f"{path}: the sample has no {part}")
  raw = offsets.read_span(path, offset, size)
  if len(raw) < size:
    raise BadRow(id, "broken_row", f"{path}: the shard is shorter than it was")
  return raw


class Tfds:
  """A split of a TFDS builder in ArrayRecord format, without TensorFlow.

  Args:
    name: a builder's name ("coco_captions/2014:1.1.0") or the directory of a
      prepared one.
    split: as in TFDS, slices included: "train[:10%]".
    image: the image feature. Its bytes are decoded by us, as everywhere.
    caption: the caption feature, text or a sequence of texts; found by its
      usual names if not given.
    data_dir: where TFDS keeps prepared data.
  """

  def __init__(
    self,
    name: str,
    split: str,
    *,
    image: str = "image",
    caption: str | None = None,
    data_dir: str | None = None,
  ):
    # Seconds of import that only those who read TFDS should pay.
    import tensorflow_datasets as tfds

    self._label = f"{name}/{split}"
    if os.path.isdir(name):
      builder = tfds.builder_from_directory(name)
    else:
      builder = tfds.builder(name, data_dir=data_dir)
    if not builder.info.splits:
      raise ValueError(
        f"tfds {name}: not prepared in {builder.data_dir}. Run "
        "builder.download_and_prepare(file_format='array_record') first."
      )
    features = sorted(builder.info.features)
    named = [key for key in _TFDS_CAPTIONS if key in features]
    self._caption = caption or next(iter(named), "caption")
    self._image = image
    for key in (self._image, self._caption):
      if key not in features:
        raise ValueError(f"tfds {name}: no feature {key!r} in {features}.")
    ids = [key for key in _TFDS_IMAGE_IDS if key in features]
    self._image_id = ids[0] if ids else None
    self._rows = builder.as_data_source(
      split=split, decoders={image: tfds.decode.SkipDecoding()}
    )

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> Record:
    index = range(len(self))[index]
    row = self._rows[index]
    id = f"{self._label}:{index}"
    caption = row[self._caption]
    if isinstance(caption, dict):  # coco_captions: {"id": [...], "text": [...]}
      caption = caption["text"]
    if not len(caption):
      raise BadRow(id, "empty_caption", f"tfds {id}")
    record = {"image": row[self._image], "caption": caption, "id": id}
    if self._image_id:
      image_id = row[self._image_id]
      # str and int as everywhere else, not bytes and numpy's scalars.
      is_text = isinstance(image_id, bytes)
      record["image_id"] = image_id.decode() if is_text else int(image_id)
    return record
