"""Captions of a folder, or of tar shards: one line of JSON for each picture."""

import glob
import io
import json
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from blip_jax.data import datasets, examples, loader, rejects, sources
from blip_jax.inference import model as model_lib
from blip_jax.runtime import (
  files,
  sharding,
)

log = logging.getLogger(__name__)


def caption_images(config: ConfigDict, workdir: str) -> dict[str, int]:
  """Captions every picture of `config.images` into `config.out`.

  A line is {row, id, image_id?, caption, log_prob, score, others?}, or {row,
  id, error} for a picture that cannot be read; rows are in order.  Lines are
  collected beside the result, which appears when it is whole; a job that was
  stopped goes on behind them.  Each process writes a part of its own.

  Args:
    config: from `config.caption_images`.
    workdir: where `captions.jsonl` goes if the config does not say.

  Raises:
    ValueError: there are no pictures, the model cannot write, or an option
      cannot be; says which.
  """
  source = datasets.open_images(_images(config), config.image_root)
  out = pathlib.Path(config.out or os.path.join(workdir, "captions.jsonl"))
  out.parent.mkdir(parents=True, exist_ok=True)
  if out.exists():
    log.warning("%s is whole already; delete it to write it anew", out)
    return {"images": len(source)}
  left = _rows_left(out, source)
  todo = sources.Noted(sources.Rows(source, left), _note)
  log.info("%d of %d pictures to caption", len(todo), len(source))

  mesh = sharding.make_mesh(config.mesh)
  model = model_lib.load(
    config.model,
    task="caption",
    dtype=config.dtype or model_lib.quick_dtype(),
    mesh=mesh,
    tokenizer=config.tokenizer or None,
  )
  options = {k: v for k, v in config.generation.items() if v is not None}
  write = model.captioner(config.prompt, **options)
  batch_size = sharding.padded_batch_size(config.batch_size, mesh)
  rows = loader.eval_loader(
    todo,
    examples.ImageExample(model.image),
    batch_size // jax.process_count(),
    num_threads=config.num_threads,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    bad_samples=(bad := rejects.Reasons()),
  )
  bar = tqdm.tqdm(
    total=len(source),
    initial=len(source) - len(todo),
    unit="img",
    disable=jax.process_index() > 0,
  )
  with bar, _open_part(out) as part:
    for places, ids, arrays in _batches(rows):
      captions = write(arrays["image"], config.seed)
      for place, id, caption in zip(places, ids, captions, strict=True):
        if not id:  # fills up the last batch
          continue
        line = {"row": int(left[place]), "id": id}
        path, note = todo.notes.pop(place, ("", {}))
        line |= note
        if (why := bad.of.pop(id, None)) is not None:
          line |= {"error": why}
        else:
          line |= _as_json(caption)
          if config.sidecars:
            _write_sidecar(path, caption)
        part.write(_as_line(line))
      part.flush()
      bar.update(min(len(ids) * jax.process_count(), bar.total - bar.n))
  # All of them have written when each knows what the others found.
  unreadable = multihost_utils.process_allgather(bad.reasons.total()).sum()
  if jax.process_index() == 0:
    _join(out)
  log.info("Captions are in %s", out)
  return {"images": len(source), "unreadable": int(unreadable)}


def _images(config: ConfigDict) -> str:
  if not config.images:
    raise ValueError(
      "config.images: nothing to caption; for example --config.images=FOLDER"
    )
  return config.images


def _note(place: int, record: sources.Record) -> tuple[str, dict[str, Any]]:
  """Where a picture lies, and its number if it has one."""
  name = sources.image_id(record)
  return sources.image_path(record), {} if name is None else {"image_id": name}


def _batches(rows: loader.EvalLoader) -> Iterator[tuple[range, list, dict]]:
  """Batches of this process, with the places of their rows."""
  for number, (arrays, ids) in enumerate(rows):
    block = number * jax.process_count() + jax.process_index()
    start = block * len(ids)
    yield range(start, start + len(ids)), ids, arrays


def _as_json(caption: model_lib.Caption) -> dict[str, Any]:
  line = {
    "caption": caption.text,
    "log_prob": round(caption.log_prob, 4),
    "score": round(caption.score, 4),
  }
  if caption.others:
    line["others"] = [_as_json(other) for other in caption.others]
  return line


def _write_sidecar(picture: str, caption: model_lib.Caption) -> None:
  """Captions in a text beside their picture. One that is there already, which
  somebody may have written by hand, stays."""
  if not picture:
    raise ValueError(
      "config.sidecars: there are files to write beside pictures in a folder "
      "only, and these lie in shards or tables; leave it out"
    )
  path = pathlib.Path(picture).with_suffix(".txt")
  if path.exists():
    log.warning("%s is there already and was left as it is", path)
    return
  texts = [one.text for one in (caption, *caption.others)]
  files.write_text(path, "".join(f"{text}\n" for text in texts))


def _parts(out: pathlib.Path) -> list[pathlib.Path]:
  return sorted(out.parent.glob(f"{glob.escape(out.name)}.part*"))


def _rows_left(out: pathlib.Path, source: Any) -> np.ndarray:
  """Rows that no part has a line of.

  Raises:
    ValueError: the parts are of other pictures.
  """
  left = np.ones(len(source), bool)
  # Of every process, and all read them before any of them writes.
  for part in _parts(out):
    line = None
    for line in _whole_lines(part):
      if line["row"] < len(left):
        left[line["row"]] = False
    if line and sources.row_id(source, line["row"]) != line["id"]:
      raise ValueError(
        f"{part}: row {line['row']} is {line['id']!r}, which config.images "
        "does not have there; give the same pictures as before, or delete the "
        "file to begin anew"
      )
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("parts read")
  return np.flatnonzero(left)


def _whole_lines(part: pathlib.Path) -> Iterator[dict[str, Any]]:
  """All but a last one that was cut in the middle."""
  with open(part, "rb") as file:
    for line in file:
      if line.endswith(b"\n"):
        yield json.loads(line)


def _open_part(out: pathlib.Path) -> io.TextIOBase:
  """The part of this process, to go on behind its last whole line."""
  part = out.with_name(f"{out.name}.part{jax.process_index()}")
  if part.exists():
    with open(part, "rb") as file:
      whole = sum(len(line) for line in file if line.endswith(b"\n"))
    os.truncate(part, whole)
  return open(part, "a", encoding="utf-8")


def _join(out: pathlib.Path) -> None:
  """Makes one file of all parts, row by row."""
  first, *others = _parts(out)
  if others:
    lines = [line for part in (first, *others) for line in _whole_lines(part)]
    lines.sort(key=lambda line: line["row"])
    files.write_text(out, "".join(map(_as_line, lines)))
  else:
    os.replace(first, out)
  for part in _parts(out):
    part.unlink()


def _as_line(line: dict[str, Any]) -> str:
  return json.dumps(line, ensure_ascii=False) + "\n"
