"""Search a gallery of pictures, by texts or by pictures (job `search`)."""

import collections
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from blip_jax.data import datasets, folders
from blip_jax.inference import images
from blip_jax.inference import index as index_lib
from blip_jax.inference import model as model_lib
from blip_jax.runtime import (
  contact_sheet,
  files,
  sharding,
)

log = logging.getLogger(__name__)

# Of the contact sheet: the first queries, and the best pictures of each.
SHEET_ROWS, SHEET_COLUMNS = 12, 6


def search(config: ConfigDict, workdir: str) -> dict[str, int]:
  """Finds pictures of `config.images` for every query of `config.queries`.

  Embeds the pictures into `config.index` unless that is done, takes the
  nearest to each query by cosine and, if the query is a text, ranks the best
  `config.rerank` of them anew by ITM. Writes `config.out`, a list of {query,
  found: [{row, id, image?, cosine, itm_prob?, rank_score?}, ...]}, the best
  first, and beside it a contact sheet.

  Args:
    config: from `config.search`.
    workdir: where index and result go if the config does not say.

  Raises:
    ValueError: there are no pictures or no queries, the index was made by
      other weights, or an option cannot be; says which.
  """
  if jax.process_count() > 1:
    raise ValueError("search runs as one process; leave out --distributed")
  queries = read_queries(config.queries)
  if not config.images:
    raise ValueError(
      "config.images: no gallery; for example --config.images=FOLDER"
    )
  open_gallery = (
    datasets.open_videos if config.num_frames else datasets.open_images
  )
  source = open_gallery(config.images, config.image_root)
  out = pathlib.Path(config.out or os.path.join(workdir, "search.json"))
  out.parent.mkdir(parents=True, exist_ok=True)
  model = model_lib.load(
    config.model,
    task="itm",
    dtype=config.dtype or model_lib.quick_dtype(),
    mesh=sharding.make_mesh(config.mesh),
    tokenizer=config.tokenizer or None,
  )
  # Before hours go into the index.
  texts = {n: q for n, q in enumerate(queries) if not folders.is_image(q)}
  vectors = _embed(model, queries, texts)
  index = index_lib.build(
    config.index or os.path.join(workdir, "index"),
    model,
    source,
    config.batch_size,
    config.num_threads,
    config.num_frames,
  )
  read = images.ImageReader(model.image, num_frames=config.num_frames)
  nearest = index.nearest(vectors, max(config.top, config.rerank), config.faiss)
  ranked = _rerank(model, source, read, texts, nearest.rows[:, : config.rerank])
  answers = []
  for number, query in enumerate(queries):
    found = [
      {"row": row, "id": index.ids[row], "cosine": float(cosine)}
      | ranked.get((number, row), {})
      for row, cosine in zip(
        nearest.rows[number].tolist(), nearest.cosine[number], strict=True
      )
      if row != index_lib.NONE
    ]
    # Those that were not ranked anew keep their order behind the others.
    found.sort(key=lambda one: -one.get("rank_score", -np.inf))
    best = [one | _path(source, one["row"]) for one in found[: config.top]]
    answers.append({"query": query, "found": best})
  files.write_json(out, answers)
  _draw(answers, source, config.num_frames, out.with_suffix(".png"))
  log.info("%s and %s say what was found", out, out.with_suffix(".png"))
  return {
    "queries": len(queries),
    "images": len(index.ids),
    "unreadable": len(index.unreadable),
  }


def read_queries(spec: str) -> list[str]:
  """Texts and paths of pictures, from what `config.queries` says.

  Args:
    spec: a text; a picture; or a file of either, a line each (.txt) or a list
      of strings (.json).

  Raises:
    ValueError: there is none, or a file is missing.
  """
  queries = [spec]
  ending = os.path.splitext(spec)[1].lower()
  if ending in (".txt", ".json"):
    try:
      content = pathlib.Path(spec).read_text(encoding="utf-8")
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
      "config.queries: nothing to look for; for example "
      "--config.queries='a dog on a beach'"
    )
  for query in queries:
    if folders.is_image(query) and not os.path.isfile(query):
      raise ValueError(f"config.queries: {query}: no such picture")
  return queries


def _embed(
  model: model_lib.Model, queries: Sequence[str], texts: Mapping[int, str]
) -> Float[np.ndarray, "Q C"]:
  vectors = dict.fromkeys(range(len(queries)))
  photos = [number for number in vectors if number not in texts]
  if texts:
    embedded = model.embed_texts(list(texts.values()))
    vectors |= zip(texts, embedded, strict=True)
  if photos:
    embedded = model.embed_images([queries[number] for number in photos])
    vectors |= zip(photos, embedded, strict=True)
  return np.stack(list(vectors.values()))


def _rerank(
  model: model_lib.Model,
  source: Any,
  read: images.ImageReader,
  texts: Mapping[int, str],
  nearest: Int[np.ndarray, "Q k"],
) -> dict[tuple[int, int], dict[str, float]]:
  """What ITM says of (query, row) where the query is a text."""
  if not texts or not nearest.size:
    return {}
  queries, wanted = list(texts), collections.defaultdict(list)
  for place, query in enumerate(queries):
    for row in set(nearest[query].tolist()) - {index_lib.NONE}:
      wanted[row].append(place)
  rows = list(wanted)
  matches = model.matcher.scored(
    (source[row]["image"] for row in rows),
    model.matcher.tokens(list(texts.values())),
    lambda number: np.array(wanted[rows[number]]),
    read,
  )
  return {
    (queries[place], row): {"itm_prob": float(prob), "rank_score": float(score)}
    for row, match in zip(tqdm.tqdm(rows, unit="img"), matches, strict=True)
    for place, prob, score in zip(
      wanted[row], match.itm_prob, match.rank_score, strict=True
    )
  }


def _path(source: Any, row: int) -> dict[str, str]:
  """Where a picture lies, if it is a file of its own."""
  image = source[row]["image"]
  return {"image": image} if isinstance(image, str) else {}


def _draw(
  answers: Sequence[dict], source: Any, num_frames: int, path: pathlib.Path
) -> None:
  """A contact sheet, a row of pictures a query; of a video, its first."""
  cells = []
  for answer in answers[:SHEET_ROWS]:
    for rank, one in enumerate(answer["found"][:SHEET_COLUMNS], 1):
      says = f"cosine {one['cosine']:.2f}"
      if "itm_prob" in one:
        says += f", match {one['itm_prob']:.0%}"
      lines = (
        contact_sheet.Line(f"{rank}. of", answer["query"]),
        contact_sheet.Line(says, os.path.basename(one.get("image", one["id"]))),
      )
      picture = source[one["row"]]["image"]
      if num_frames:
        from blip_jax.data import video

        (picture,) = video.read(picture, 1, contact_sheet.PICTURE)
      picture = images.open_image(picture)
      cells.append(contact_sheet.Cell(picture, lines))
  columns = max(len(answer["found"]) for answer in answers)
  contact_sheet.contact_sheet(cells, path, columns=min(columns, SHEET_COLUMNS))
