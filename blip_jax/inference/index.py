"""Embeddings of a gallery of images on disk, made once and searched often.

A folder has `index.json` (the settings that it was made with), and for every
`PART` images `part-<number>.npy` (unit vectors, float32 [n, C]) and
`part-<number>.json` (the images' rows in the source and their ids; why others
could not be read), which is written last.
"""

import collections
import fnmatch
import functools
import io
import logging
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from blip_jax.data import examples, loader, rejects, sources
from blip_jax.inference import matching
from blip_jax.inference import model as model_lib
from blip_jax.runtime import (
  files,
  lock,
  progress,
  resumable,
  sharding,
  snapshot,
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


class Index:
  """The embeddings of a source's images.

  Attributes:
    ids: row in the source -> id, of the images that could be read.
    unreadable: id -> reason, of the others.
  """

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self.ids: dict[int, str] = {}
    self.unreadable: dict[str, str] = {}
    self._rows: list[Int[np.ndarray, " n"]] = []
    for part in _parts(folder):
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
    parts = (
      np.load(part.with_suffix(".npy"), mmap_mode="r")
      for part in _parts(self._folder)
    )
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

  Parts that are complete are kept, so that a stopped job resumes.

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
  folder = pathlib.Path(folder)
  _begin(folder, model, source, num_frames)
  starts = range(0, len(source), PART)
  is_missing = lambda start: not _is_sound(_part(folder, start), len(source))
  if any(map(is_missing, starts)):
    with lock.hold(folder / ".lock") as held:
      # Another process may just have built it.
      missing = [*filter(is_missing, starts)]
      embed = functools.partial(
        _embed,
        model=model,
        source=source,
        batch_size=batch_size,
        num_threads=num_threads,
        num_frames=num_frames,
      )
      _build(folder, missing, len(source), embed, held)
  index = Index(folder)
  if not index.ids:
    first = next(iter(index.unreadable.items()), "")
    for start in starts:
      files.remove(_part(folder, start))  # so that the next job tries again
    raise ValueError(f"{folder}: no image could be read; the first: {first}")
  _refuse_duplicates(folder, index)
  return index


def _build(
  folder: pathlib.Path,
  missing: Sequence[int],
  num_images: int,
  embed: Callable[..., None],
  held: lock.Lock,
) -> None:
  """Writes the parts that are missing, by the numbers of their first images."""
  parts = {s: np.arange(s, min(s + PART, num_images)) for s in missing}
  done = num_images - sum(map(len, parts.values()))
  with progress.bar(
    total=num_images, initial=done, unit="img", disable=not missing
  ) as bar:
    for start, rows in parts.items():
      held.check()
      embed(_part(folder, start), rows)
      bar.update(len(rows))


def _begin(
  folder: pathlib.Path, model: model_lib.Model, source: Any, num_frames: int
) -> None:
  """Starts an index, or refuses one that was made with other settings."""
  settings = {
    "weights": snapshot.digest(model.params),
    "dtype": model.card.config.vit.dtype,
    "image_size": list(model.card.config.vit.image_size),
    "num_frames": num_frames,
    "images": len(source),
    "first": sources.row_id(source, 0),
    "last": sources.row_id(source, len(source) - 1),
  }
  resumable.begin(
    folder / "index.json",
    settings,
    "Name another folder with config.index, or delete this one",
  )


def _embed(
  part: pathlib.Path,
  rows: Int[np.ndarray, " n"],
  model: model_lib.Model,
  source: Any,
  batch_size: int,
  num_threads: int,
  num_frames: int,
) -> None:
  """Writes a part: the vectors, then the rows and ids that they belong to."""
  batches = loader.eval_loader(
    sources.Rows(source, rows),
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
  files.write_bytes(part.with_suffix(".npy"), file.getvalue())
  files.write_json(
    part,
    {
      "rows": rows[np.flatnonzero(valid)].tolist(),
      "ids": [ids[position] for position in np.flatnonzero(valid)],
      "unreadable": bad.by_id,
    },
  )


def _refuse_duplicates(folder: pathlib.Path, index: Index) -> None:
  counts = collections.Counter(index.ids.values())
  duplicates = [id for id, count in counts.items() if count > 1]
  if duplicates:
    raise ValueError(
      f"{folder}: {len(duplicates)} ids belong to several images, such as "
      f"{duplicates[0]!r}, so that results would be ambiguous"
    )


def _is_sound(part: pathlib.Path, num_images: int) -> bool:
  """Whether a part is there, and its vectors fit its rows."""
  if not files.exists(part):
    return False
  try:
    content = files.read_json(part)
    rows, ids = np.array(content["rows"]), content["ids"]
    vectors = np.load(part.with_suffix(".npy"), mmap_mode="r")
    start = int(part.stem.removeprefix("part-")) * PART
    end = min(start + PART, num_images)
    num_sound = len(rows) + len(content["unreadable"])
    if (
      vectors.dtype == np.float32
      and vectors.ndim == 2
      and len(rows) == len(ids) == len(vectors)
      and num_sound <= end - start
      and all(type(row) is int for row in content["rows"])
      and (not len(rows) or (start <= rows.min() and rows.max() < end))
      and all(isinstance(id, str) for id in ids)
    ):
      return True
    problem = "its vectors, rows and ids do not belong together"
  # Of a file that is overwritten, anything may be raised.
  except Exception as error:
    problem = f"{type(error).__name__}: {error}"
  log.warning("%s: damaged: %s; its images are embedded again", part, problem)
  return False


def _parts(folder: pathlib.Path) -> list[pathlib.Path]:
  names = fnmatch.filter(files.list_folder(folder), "part-*.json")
  return [folder / name for name in names]


def _part(folder: pathlib.Path, start: int) -> pathlib.Path:
  return folder / f"part-{start // PART:06d}.json"
