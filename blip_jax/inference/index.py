"""Embeddings of a gallery of pictures on disk, made once and searched often.

A folder has `index.json` (what made it), and for every `PART` pictures
`part-<number>.npy` (unit vectors, float32 [n, C]) and `part-<number>.json`
(their rows in the source and their ids; and why others could not be read),
which is written last.
"""

import collections
import functools
import io
import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
import tqdm
from jaxtyping import Float, Int

from blip_jax.data import examples, loader, rejects, sources
from blip_jax.inference import model as model_lib
from blip_jax.runtime import files, resumable, sharding, snapshot

# Pictures of which a job that is stopped loses the embeddings, at most.
PART = 4096
# What FAISS says where it found nothing more.
NONE = -1


class Nearest(NamedTuple):
  """The best pictures of each of Q queries, the best first.

  Attributes:
    rows: in the source; NONE where FAISS found fewer.
    cosine: with the query.
  """

  rows: Int[np.ndarray, "Q k"]
  cosine: Float[np.ndarray, "Q k"]


class Index:
  """The embeddings of a source's pictures.

  Attributes:
    ids: row in the source -> id, of pictures that could be read.
    unreadable: id -> why, of the others.
  """

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self.ids: dict[int, str] = {}
    self.unreadable: dict[str, str] = {}
    self._rows = []
    for part in _parts(folder):
      said = json.loads(part.read_text())
      self.ids |= zip(said["rows"], said["ids"], strict=True)
      self.unreadable |= said["unreadable"]
      self._rows.append(np.array(said["rows"], int))

  def nearest(
    self, queries: Float[np.ndarray, "Q C"], k: int, factory: str = ""
  ) -> Nearest:
    """The k pictures that are nearest to each query, or all that there are.

    Args:
      queries: unit vectors.
      k: how many.
      factory: "" compares with every picture; else what FAISS's
        `index_factory` takes, such as "HNSW32" or "IVF4096,Flat", which is
        faster in a gallery of millions and may miss some.
    """
    k = min(k, len(self.ids))
    vectors = (
      np.load(part.with_suffix(".npy"), mmap_mode="r")
      for part in _parts(self._folder)
    )
    if factory:
      return self._by_faiss(queries, k, factory, np.concatenate([*vectors]))
    cosine = np.empty((len(queries), 0), np.float32)
    rows = np.empty((len(queries), 0), int)
    for own, vector in zip(self._rows, vectors, strict=True):
      cosine = np.concatenate([cosine, queries @ vector.T], axis=1)
      rows = np.concatenate([rows, np.tile(own, (len(queries), 1))], axis=1)
      best = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
      cosine, rows = (
        np.take_along_axis(x, best, axis=1) for x in (cosine, rows)
      )
    return Nearest(rows, cosine)

  def _by_faiss(self, queries, k, factory, vectors) -> Nearest:
    try:
      import faiss
    except ImportError as error:
      raise ValueError(
        "config.faiss: FAISS is not installed: pip install 'blip_jax[search]'; "
        "or leave it out to compare with every picture"
      ) from error
    try:
      found = faiss.index_factory(
        vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT
      )
      found.train(vectors)
    except RuntimeError as error:
      raise ValueError(f"config.faiss: {factory!r}: {error}") from error
    found.add(vectors)
    cosine, places = found.search(queries, k)
    rows = np.concatenate(self._rows)[places]
    return Nearest(np.where(places == NONE, NONE, rows), cosine)


def build(
  folder: str | os.PathLike,
  model: model_lib.Model,
  source: Any,
  batch_size: int,
  num_threads: int = 8,
  num_frames: int = 0,
) -> Index:
  """The index of a source's pictures, or of its videos if frames are to be
  taken of them; what is there of it already stays.

  Raises:
    ValueError: the folder has the index of other weights or pictures, none of
      the pictures can be read, or two have the same id.
  """
  folder = pathlib.Path(folder)
  _check(folder, model, source, num_frames)
  embed = functools.partial(
    _embed,
    model=model,
    source=source,
    batch_size=batch_size,
    num_threads=num_threads,
    num_frames=num_frames,
  )
  starts = range(0, len(source), PART)
  todo = [start for start in starts if not _part(folder, start).exists()]
  done = sum(min(PART, len(source) - s) for s in starts if s not in todo)
  with tqdm.tqdm(
    total=len(source), initial=done, unit="img", disable=not todo
  ) as bar:
    for start in todo:
      rows = np.arange(start, min(start + PART, len(source)))
      embed(_part(folder, start), rows)
      bar.update(len(rows))
  index = Index(folder)
  if not index.ids:
    first = next(iter(index.unreadable.items()), "")
    raise ValueError(f"{folder}: no picture could be read; the first: {first}")
  _refuse_duplicates(folder, index)
  return index


def _check(
  folder: pathlib.Path, model: model_lib.Model, source: Any, num_frames: int
) -> None:
  """Begins an index, or refuses one that something else has made."""
  made_by = {
    "weights": snapshot.digest(model.params),
    "image_size": list(model.card.config.vit.image_size),
    "num_frames": num_frames,
    "pictures": len(source),
    "first": sources.row_id(source, 0),
    "last": sources.row_id(source, len(source) - 1),
  }
  resumable.begin(
    folder / "index.json",
    made_by,
    "Name another folder with config.index, or delete this one",
  )


def _embed(
  part, rows, model, source, batch_size, num_threads, num_frames
) -> None:
  """Writes a part: the vectors, then what they are of."""
  loaded = loader.eval_loader(
    sources.Rows(source, rows),
    examples.ImageExample(model.image, num_frames=num_frames),
    sharding.padded_batch_size(batch_size, model.mesh),
    num_threads=num_threads,
    bad_samples=(bad := rejects.Reasons()),
  )
  vectors, valid, ids = [], [], []
  for arrays, own in loaded:
    vectors.append(model.matcher.image_feat(arrays["image"]))
    valid.append(arrays["valid"])
    ids += own
  valid = np.concatenate(valid)
  file = io.BytesIO()
  np.save(file, np.concatenate(vectors)[valid])
  files.write_bytes(part.with_suffix(".npy"), file.getvalue())
  files.write_json(
    part,
    {
      "rows": rows[np.flatnonzero(valid)].tolist(),
      "ids": [ids[place] for place in np.flatnonzero(valid)],
      "unreadable": bad.of,
    },
  )


def _refuse_duplicates(folder: pathlib.Path, index: Index) -> None:
  times = collections.Counter(index.ids.values())
  twice = [id for id, number in times.items() if number > 1]
  if twice:
    raise ValueError(
      f"{folder}: {len(twice)} ids are those of several pictures, such as "
      f"{twice[0]!r}, so that nobody could tell which was found"
    )


def _parts(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(folder.glob("part-*.json"))


def _part(folder: pathlib.Path, start: int) -> pathlib.Path:
  return folder / f"part-{start // PART:06d}.json"
