"""Embeddings of a gallery of images on disk, made once and searched often.

A folder has `index.json` (the settings that it was made with), and for every
`PART` images `part-<number>.npy` (unit vectors, float32 [n, C]) and
`part-<number>.json` (the images' rows in the source and their ids; why others
could not be read), which is written last. That also has hashes: of the settings
and of what tells that the images are still the same, of the vectors, and of
itself. A part that they do not fit is made again.
"""

import collections
import concurrent.futures
import functools
import hashlib
import io
import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from blip_jax.data import examples, loader, rejects, sources
from blip_jax.inference import matching, stamps
from blip_jax.inference import model as model_lib
from blip_jax.runtime import (
  files,
  lock,
  progress,
  resumable,
  saved_arrays,
  sharding,
)

log = logging.getLogger(__name__)

# Images per part. A job that is stopped loses the part that it was working on.
PART = 4096
# What FAISS returns where it finds fewer than k.
NONE = -1


class Nearest(NamedTuple):
  """The k best images of each of Q queries, best first.

  Attributes:
    rows: of the images in the source; NONE where FAISS found fewer than k.
    cosine: of image and query.
  """

  rows: Int[np.ndarray, "Q k"]
  cosine: Float[np.ndarray, "Q k"]

  def __repr__(self) -> str:
    return f"Nearest({matching.brief(**self._asdict())})"


class _Part(NamedTuple):
  """What a part is to have.

  Attributes:
    rows: of its images in the source.
    origin: the hash of the settings, and of the images' ids and stamps.
  """

  rows: Int[np.ndarray, " n"]
  origin: str


class Index:
  """The embeddings of a source's images.

  Args:
    folder: of the index.
    parts: that are sound; others in the folder are ignored.

  Attributes:
    ids: row in the source -> id, of the images that could be read.
    unreadable: id -> reason, of the others.
  """

  def __init__(
    self, folder: pathlib.PurePath, parts: Sequence[pathlib.PurePath]
  ):
    self._folder = folder
    self._parts = parts
    self.ids: dict[int, str] = {}
    self.unreadable: dict[str, str] = {}
    self._rows: list[Int[np.ndarray, " n"]] = []
    for part in parts:
      content = files.read_json(part)
      self.ids |= zip(content["rows"], content["ids"], strict=True)
      self.unreadable |= content["unreadable"]
      self._rows.append(np.array(content["rows"], int))

  def __repr__(self) -> str:
    return (
      f"Index({str(self._folder)!r}, {len(self.ids)} images, "
      f"{len(self.unreadable)} unreadable)"
    )

  def nearest(
    self, queries: Float[np.ndarray, "Q C"], k: int, factory: str = ""
  ) -> Nearest:
    """Finds the k images nearest to each query, or all if there are fewer.

    Args:
      queries: unit vectors.
      k: number of images per query.
      factory: "" compares with every image; otherwise a string for FAISS's
        `index_factory`, such as "HNSW32" or "IVF4096,Flat", which is faster in
        a gallery of millions and may miss some.

    Raises:
      ValueError: FAISS is not installed, or does not know the factory.
    """
    k = min(k, len(self.ids))
    parts = map(_vectors, self._parts)
    if factory:
      return self._by_faiss(queries, k, factory, np.concatenate([*parts]))
    cosine = np.empty((len(queries), 0), np.float32)
    rows = np.empty((len(queries), 0), int)
    for part_rows, vectors in zip(self._rows, parts, strict=True):
      cosine = np.concatenate([cosine, queries @ vectors.T], axis=1)
      rows = np.concatenate(
        [rows, np.tile(part_rows, (len(queries), 1))], axis=1
      )
      best = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
      cosine, rows = (
        np.take_along_axis(x, best, axis=1) for x in (cosine, rows)
      )
    return Nearest(rows, cosine)

  def _by_faiss(
    self,
    queries: Float[np.ndarray, "Q C"],
    k: int,
    factory: str,
    vectors: Float[np.ndarray, "n C"],
  ) -> Nearest:
    try:
      import faiss
    except ImportError as error:
      raise ValueError(
        "config.faiss: FAISS is not installed: pip install 'blip_jax[search]'; "
        "or leave it out to compare with every image"
      ) from error
    try:
      index = faiss.index_factory(
        vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT
      )
      index.train(vectors)
    except RuntimeError as error:
      raise ValueError(f"config.faiss: {factory!r}: {error}") from error
    index.add(vectors)
    cosine, positions = index.search(queries, k)
    rows = np.concatenate(self._rows)[positions]
    return Nearest(np.where(positions == NONE, NONE, rows), cosine)


def build(
  folder: str | os.PathLike,
  model: model_lib.Model,
  source: Any,
  batch_size: int,
  num_threads: int = 8,
  num_frames: int = 0,
) -> Index:
  """Embeds a source's images, unless that is done, and opens the index.

  Parts that are complete are kept, so that a stopped job resumes. Those that
  are damaged, or whose images have changed, are made again.

  Args:
    folder: of the index.
    model: with ITC.
    source: random access to records.
    batch_size: images per batch.
    num_threads: that read images.
    num_frames: frames sampled from each video; 0: the source has images.

  Raises:
    ValueError: the folder has the index of another model or source, another
      process builds it, no image can be read, or two have the same id.
  """
  folder = files.as_path(folder)
  settings = _begin(folder, model, source, num_frames)
  parts = _planned(folder, source, settings)
  problem = lambda part: _problem(part, parts[part].origin)
  if missing := [*filter(problem, parts)]:
    with lock.hold(folder / ".lock") as held:
      # Another process may just have made them.
      problems = {part: problem(part) for part in missing}
      missing = [part for part in missing if problems[part]]
      for part in filter(files.exists, missing):
        log.warning(
          "%s: %s; its images are embedded again", part, problems[part]
        )
      embed = functools.partial(
        _embed,
        model=model,
        source=source,
        batch_size=batch_size,
        num_threads=num_threads,
        num_frames=num_frames,
      )
      _build({part: parts[part] for part in missing}, len(source), embed, held)
  index = Index(folder, [*parts])
  if not index.ids:
    first = next(iter(index.unreadable.items()), "")
    for part in parts:
      files.remove(part)  # so that the next job tries again
    raise ValueError(f"{folder}: no image could be read; the first: {first}")
  _refuse_duplicates(folder, index)
  return index


def _planned(
  folder: pathlib.PurePath, source: Any, settings: Mapping[str, Any]
) -> dict[pathlib.PurePath, _Part]:
  """What the parts of a source's index are to have, by their paths."""
  starts = range(0, len(source), PART)
  parts = [np.arange(s, min(s + PART, len(source))) for s in starts]
  digest = stamps.Stamps(source).digest
  with concurrent.futures.ThreadPoolExecutor(sources.INDEX_THREADS) as pool:
    digests = pool.map(lambda rows: digest(rows.tolist()), parts)
    origins = [_digest({"settings": settings, "images": d}) for d in digests]
  return {
    folder / f"part-{number:06d}.json": _Part(rows, origin)
    for number, (rows, origin) in enumerate(zip(parts, origins, strict=True))
  }


def _build(
  missing: Mapping[pathlib.PurePath, _Part],
  num_images: int,
  embed: Callable[..., None],
  held: lock.Lock,
) -> None:
  """Writes the parts that are missing."""
  for path in (p for part in missing for p in (part, part.with_suffix(".npy"))):
    if files.is_folder(path):
      raise ValueError(
        f"{path}: expected a file of the index, found a folder. Delete it, or "
        "name another folder with config.index"
      )
  done = num_images - sum(len(part.rows) for part in missing.values())
  with progress.bar(
    total=num_images, initial=done, unit="img", disable=not missing
  ) as bar:
    for path, part in missing.items():
      held.check()
      embed(path, part)
      bar.update(len(part.rows))


def _begin(
  folder: pathlib.PurePath, model: model_lib.Model, source: Any, num_frames: int
) -> dict[str, Any]:
  """Starts an index, or refuses one that was made with other settings."""
  settings = {
    "weights": saved_arrays.digest(model.params),
    "dtype": model.dtype,
    "image_size": list(model.card.config.vit.image_size),
    "num_frames": num_frames,
    "images": len(source),
    "first": sources.row_id(source, 0),
    "last": sources.row_id(source, len(source) - 1),
  }
  return resumable.begin(
    folder / "index.json",
    settings,
    "Name another folder with config.index, or delete this one",
  )


def _embed(
  path: pathlib.PurePath,
  part: _Part,
  model: model_lib.Model,
  source: Any,
  batch_size: int,
  num_threads: int,
  num_frames: int,
) -> None:
  """Writes a part: the vectors, then the rows and ids that they belong to."""
  batches = loader.eval_loader(
    sources.Rows(source, part.rows),
    examples.ImageExample(model.image, num_frames=num_frames),
    sharding.padded_batch_size(batch_size, model.mesh),
    num_threads=num_threads,
    bad_samples=(bad := rejects.Reasons()),
  )
  vectors, valid, ids = [], [], []
  for arrays, batch_ids in batches:
    vectors.append(model.matcher.image_feat(arrays["image"]))
    valid.append(arrays["valid"])
    ids += batch_ids
  valid = np.concatenate(valid)
  file = io.BytesIO()
  np.save(file, np.concatenate(vectors)[valid])
  files.write_bytes(path.with_suffix(".npy"), file.getvalue())
  content = {
    "origin": part.origin,
    "vectors": hashlib.sha256(file.getvalue()).hexdigest(),
    "rows": part.rows[np.flatnonzero(valid)].tolist(),
    "ids": [ids[position] for position in np.flatnonzero(valid)],
    "unreadable": bad.by_id,
  }
  files.write_json(path, content | {"digest": _digest(content)})


def _refuse_duplicates(folder: pathlib.PurePath, index: Index) -> None:
  counts = collections.Counter(index.ids.values())
  duplicates = [id for id, count in counts.items() if count > 1]
  if duplicates:
    raise ValueError(
      f"{folder}: {len(duplicates)} ids belong to several images, such as "
      f"{duplicates[0]!r}, so that results would be ambiguous"
    )


def _problem(path: pathlib.PurePath, origin: str) -> str:
  """Why a part cannot be used; "" if it can.

  Args:
    path: of the part.
    origin: see `_Part`.
  """
  try:
    content = files.read_json(path)
    if content.pop("digest", None) != _digest(content):
      return "damaged: it has another hash than it was written with"
    if content["vectors"] != files.sha256(path.with_suffix(".npy")):
      return "damaged: its vectors have another hash than it says"
    return "" if content["origin"] == origin else "its images have changed"
  # Of a file that is overwritten, anything may be raised.
  except Exception as error:
    return f"damaged: {type(error).__name__}: {error}"


def _digest(content: Mapping[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def _vectors(part: pathlib.PurePath) -> Float[np.ndarray, "n C"]:
  with files.open_read(part.with_suffix(".npy")) as file:
    return np.load(file)
