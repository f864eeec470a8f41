"""Search a gallery of images by texts or by images (job `search`)."""

import collections
import functools
import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from blip_jax.data import datasets, folders, sources, thumbnails
from blip_jax.inference import images, loading
from blip_jax.inference import index as index_lib
from blip_jax.inference import model as model_lib
from blip_jax.runtime import config as run_config
from blip_jax.runtime import contact_sheet, devices, files, progress, sharding
from blip_jax.runtime.config import Config

log = logging.getLogger(__name__)

# On the contact sheet: the first queries, and the best images of each.
SHEET_ROWS, SHEET_COLUMNS = 12, 6


def search(config: Config, workdir: str) -> dict[str, int]:
  """Finds images of `config.images` for every query of `config.queries`.

  Embeds the images into `config.index` unless that is done, takes those nearest
  to each query by cosine and, if the query is a text, re-ranks the best
  `config.rerank` of them by ITM. Writes `config.out`, a list of {query, found:
  [{row, id, image?, cosine, itm_prob?, rank_score?}, ...]}, best first, and a
  contact sheet next to it. An image that several rows name is found once.

  Args:
    config: from `defaults.search`.
    workdir: where the index and the results go by default.

  Returns:
    The number of queries, of images, and of unreadable images.

  Raises:
    ValueError: there are no images or no queries, the index was made with
      other weights, or an option is out of range; says which.
  """
  if jax.process_count() > 1:
    raise ValueError("search runs as one process; leave out --distributed")
  run_config.at_least(1, config, "num_threads", "top")
  run_config.at_least(0, config, "batch_size", "rerank", "num_frames")
  queries = read_queries(config.queries)
  if not config.images:
    raise ValueError(
      "config.images: no gallery; for example --config.images=FOLDER"
    )
  open_gallery = (
    datasets.open_videos if config.num_frames else datasets.open_images
  )
  source = open_gallery(config.images, config.image_root)
  out = files.as_path(config.out or os.path.join(workdir, "search.json"))
  files.make_folder(out.parent)
  model = loading.load(
    config.model,
    task="itm",
    dtype=config.dtype or loading.quick_dtype(),
    mesh=sharding.make_mesh(config.mesh),
    tokenizer=config.tokenizer or None,
  )
  # Queries first: a mistake in them must not cost the hours of an index.
  texts = {n: q for n, q in enumerate(queries) if not folders.is_image(q)}
  vectors = _embed(model, queries, texts)
  index = index_lib.build(
    config.index or os.path.join(workdir, "index"),
    model,
    source,
    config.batch_size or devices.images_per_batch(model.mesh.devices),
    config.num_threads,
    config.num_frames,
  )
  read = images.ImageReader(model.image, num_frames=config.num_frames)
  nearest = _nearest(
    index, source, vectors, max(config.top, config.rerank), config.faiss
  )
  reranked = _rerank(
    model, source, read, texts, nearest.rows[:, : config.rerank]
  )
  answers = [
    {
      "query": query,
      "found": [
        result | _path(source, result["row"])
        for result in _ranked(index, nearest, reranked, number)[: config.top]
      ],
    }
    for number, query in enumerate(queries)
  ]
  files.write_json(out, answers)
  _draw(answers, source, config.num_frames, out.with_suffix(".png"))
  log.info("Results are in %s and %s", out, out.with_suffix(".png"))
  return {
    "queries": len(queries),
    "images": len(index.ids),
    "unreadable": len(index.unreadable),
  }


def find(
  model: model_lib.Model,
  source: Any,
  index: index_lib.Index,
  query: str | bytes,
  top: int,
  rerank: int,
) -> list[dict[str, Any]]:
  """Finds images for one query.

  Args:
    model: made the index.
    source: of the images.
    index: of their embeddings.
    query: a text, or an encoded image.
    top: how many to find.
    rerank: images nearest to a text that ITM re-ranks.

  Returns:
    {row, id, cosine, itm_prob?, rank_score?} of each image, best first.

  Raises:
    ValueError: the text has no words, or the image cannot be read.
  """
  texts = {0: query} if isinstance(query, str) else {}
  vectors = (
    model.embed_texts([*texts.values()])
    if texts
    else model.embed_images([query])
  )
  nearest = _nearest(index, source, vectors, max(top, rerank), "")
  read = images.ImageReader(model.image)
  reranked = _rerank(model, source, read, texts, nearest.rows[:, :rerank], True)
  return _ranked(index, nearest, reranked, 0)[:top]


def _ranked(
  index: index_lib.Index,
  nearest: index_lib.Nearest,
  reranked: Mapping[tuple[int, int], dict[str, float]],
  number: int,
) -> list[dict[str, Any]]:
  """The images of one query, best first."""
  results: list[dict[str, Any]] = [
    {"row": row, "id": index.ids[row], "cosine": float(cosine)}
    | reranked.get((number, row), {})
    for row, cosine in zip(
      nearest.rows[number].tolist(), nearest.cosine[number], strict=True
    )
    if row != index_lib.NONE
  ]
  # Images that were not re-ranked follow, still in order of their cosine.
  return sorted(results, key=lambda r: -r.get("rank_score", -np.inf))


def read_queries(spec: str) -> list[str]:
  """Returns the queries, texts or paths of images, of `config.queries`.

  Args:
    spec: a text, the path of an image, or a file of either: one per line (.txt)
      or a list of strings (.json).

  Raises:
    ValueError: there is no query, or a file is missing.
  """
  queries = [spec]
  ending = os.path.splitext(spec)[1].lower()
  if ending in (".txt", ".json"):
    try:
      content = files.read_text(spec)
      queries = (
        json.loads(content) if ending == ".json" else content.split("\n")
      )
    except (OSError, ValueError) as error:
      raise ValueError(f"config.queries: {spec}: {error}") from error
    if not (
      isinstance(queries, list) and all(isinstance(q, str) for q in queries)
    ):
      raise ValueError(f"config.queries: {spec}: expected a list of strings")
  queries = [query.strip() for query in queries if query.strip()]
  if not queries:
    raise ValueError(
      "config.queries: there is no query; for example "
      "--config.queries='a dog on a beach'"
    )
  for query in queries:
    if folders.is_image(query) and not files.is_file(query):
      raise ValueError(f"config.queries: {query}: no such image")
  return queries


def _embed(
  model: model_lib.Model, queries: Sequence[str], texts: Mapping[int, str]
) -> Float[np.ndarray, "Q C"]:
  """Unit vectors of all queries; `texts` are those that are no images."""
  vectors = {}
  if texts:
    embedded = model.embed_texts(list(texts.values()))
    vectors |= zip(texts, embedded, strict=True)
  photos = [number for number in range(len(queries)) if number not in texts]
  if photos:
    embedded = model.embed_images([queries[number] for number in photos])
    vectors |= zip(photos, embedded, strict=True)
  return np.stack([vectors[number] for number in range(len(queries))])


def _nearest(
  index: index_lib.Index,
  source: Any,
  vectors: Float[np.ndarray, "Q C"],
  k: int,
  factory: str,
) -> index_lib.Nearest:
  """The k images nearest to each query, each once.

  A list of captions has several rows of one image, of which this is the first.
  How many there are is only known once they are found.
  """
  image_of = functools.cache(lambda row: _identity(source[row], row))
  depth = k
  while True:
    nearest = index.nearest(vectors, depth, factory)
    columns = [_firsts(rows, image_of)[:k] for rows in nearest.rows.tolist()]
    if depth >= len(index.ids) or min(map(len, columns)) >= k:
      break
    depth *= 4
  shape = len(vectors), max(map(len, columns))
  rows, cosine = np.full(shape, index_lib.NONE), np.zeros(shape, np.float32)
  for query, chosen in enumerate(columns):
    rows[query, : len(chosen)] = nearest.rows[query, chosen]
    cosine[query, : len(chosen)] = nearest.cosine[query, chosen]
  return index_lib.Nearest(rows, cosine)


def _firsts(rows: Sequence[int], image_of: Callable[[int], Any]) -> list[int]:
  """The positions at which an image occurs first."""
  firsts = {}
  for position, row in enumerate(rows):
    if row != index_lib.NONE:
      firsts.setdefault(image_of(row), position)
  return [*firsts.values()]


def _identity(record: sources.Record, row: int) -> Any:
  """Equal for two rows of one image, as far as the records say."""
  return sources.image_path(record) or record.get("image_id", ("row", row))


def _rerank(
  model: model_lib.Model,
  source: Any,
  read: images.ImageReader,
  texts: Mapping[int, str],
  nearest: Int[np.ndarray, "Q k"],
  silent: bool = False,
) -> dict[tuple[int, int], dict[str, float]]:
  """ITM scores by (query, row), of the queries that are texts."""
  if not texts or not nearest.size:
    return {}
  queries, candidates = list(texts), collections.defaultdict(list)
  for position, query in enumerate(queries):
    for row in set(nearest[query].tolist()) - {index_lib.NONE}:
      candidates[row].append(position)
  rows = list(candidates)
  matches = model.matcher.match_candidates(
    images.batches((source[row]["image"] for row in rows), read, 8, model.mesh),
    model.matcher.tokens(list(texts.values())),
    lambda number: np.array(candidates[rows[number]]),
  )
  return {
    (queries[position], row): {
      "itm_prob": float(prob),
      "rank_score": float(score),
    }
    for row, match in zip(
      progress.bar(rows, unit="img", disable=silent), matches, strict=True
    )
    if match is not None
    for position, prob, score in zip(
      candidates[row], match.itm_prob, match.rank_score, strict=True
    )
  }


def _path(source: Any, row: int) -> dict[str, str]:
  """The path of an image that is a file of its own."""
  image = source[row]["image"]
  return {"image": files.printable(image)} if isinstance(image, str) else {}


def _draw(
  answers: Sequence[dict], source: Any, num_frames: int, path: pathlib.PurePath
) -> None:
  """Draws a contact sheet, a row per query; of a video, its first frame."""
  cells = []
  for answer in answers[:SHEET_ROWS]:
    for rank, result in enumerate(answer["found"][:SHEET_COLUMNS], 1):
      scores = f"cosine {result['cosine']:.2f}"
      if "itm_prob" in result:
        scores += f", match {result['itm_prob']:.0%}"
      name = os.path.basename(result.get("image", result["id"]))
      lines = (
        contact_sheet.Line(f"rank {rank} for", answer["query"]),
        contact_sheet.Line(scores, name),
      )
      pixels = thumbnails.read(
        functools.partial(_image, source, result["row"], num_frames),
        contact_sheet.IMAGE,
        name,
      )
      cells.append(contact_sheet.Cell(pixels, lines))
  columns = max(len(answer["found"]) for answer in answers)
  contact_sheet.contact_sheet(cells, path, columns=min(columns, SHEET_COLUMNS))


def _image(source: Any, row: int, num_frames: int) -> object:
  """The image of a row; if it is a video, its first frame."""
  image = source[row]["image"]
  if not num_frames:
    return image
  from blip_jax.data import video

  (frame,) = video.read(image, 1, contact_sheet.IMAGE)
  return frame
