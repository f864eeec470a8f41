"""Caption a folder of images, or tar shards (job `caption`).

A line of JSON per image is collected in `<out>.part<process>`, and the settings
of the job are kept in `<out>.job.json`, so that a job that was stopped resumes.
When all images have a line, `<out>` replaces these files.
"""

import json
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int

from blip_jax.data import datasets, examples, folders, loader, rejects, sources
from blip_jax.inference import captioning
from blip_jax.inference import model as model_lib
from blip_jax.runtime import (
  files,
  lock,
  progress,
  resumable,
  sharding,
  snapshot,
)
from blip_jax.runtime.config import Config

log = logging.getLogger(__name__)


def caption_images(config: Config, workdir: str) -> dict[str, int]:
  """Captions every image of `config.images` into `config.out`.

  Takes a lock on `config.out`, so that no other job writes there.

  A line is {row, id, image_id?, image?, caption, log_prob, score, others?}, or
  has an `error` instead of the caption if the image cannot be read; rows are in
  order. `image` is the path, where `id` is that of a row in a list. The file
  appears when it is complete. With several processes, each captions its share
  of the images.

  Args:
    config: from `defaults.caption_images`.
    workdir: where `captions.jsonl` goes by default.

  Returns:
    The number of images, and of those that could not be read.

  Raises:
    ValueError: there are no images, none can be read, the model does not
      generate captions, an option is out of range, another job writes into
      `config.out`, or the job was started with other settings; says which.
  """
  source = datasets.open_images(_images(config), config.image_root)
  out = pathlib.Path(config.out or os.path.join(workdir, "captions.jsonl"))
  with lock.hold(lock.path_for(out)) as held:
    if files.exists(out):
      log.warning("%s is complete; delete it to caption the images again", out)
      return {"images": len(source)}
    return _caption(config, source, out, held)


def _caption(
  config: Config, source: Any, out: pathlib.Path, held: lock.Lock
) -> dict[str, int]:
  """Captions the images that have no line yet, and makes one file of all."""
  mesh = sharding.make_mesh(config.mesh)
  dtype = config.dtype or model_lib.quick_dtype()
  model = model_lib.load(
    config.model,
    task="caption",
    dtype=dtype,
    mesh=mesh,
    tokenizer=config.tokenizer or None,
  )
  options = {k: v for k, v in config.generation.items() if v is not None}
  generate = model.captioner(config.prompt, **options)
  rows = _begin(out, _settings(config, dtype, model, source, options), source)
  todo = sources.Noted(sources.Rows(source, rows), _note)
  log.info("%d of %d images to caption", len(todo), len(source))

  batch_size = sharding.padded_batch_size(config.batch_size, mesh)
  batches = loader.eval_loader(
    todo,
    examples.ImageExample(model.image),
    batch_size // jax.process_count(),
    num_threads=config.num_threads,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    bad_samples=(bad := rejects.Reasons()),
  )
  bar = progress.bar(
    total=len(source),
    initial=len(source) - len(todo),
    unit="img",
    disable=jax.process_index() > 0,
  )
  part_path = _part(out, jax.process_index())
  files.drop_partial_line(part_path)
  with bar, files.open_append(part_path) as part:
    for positions, ids, arrays in _numbered(batches):
      held.check()
      captions = generate(arrays["image"], config.seed)
      for position, id, caption in zip(positions, ids, captions, strict=True):
        if not id:  # padding of the last batch
          continue
        line = {"row": int(rows[position]), "id": id}
        path, note = todo.notes.pop(position, ("", {}))
        line |= note
        if (reason := bad.by_id.pop(id, None)) is not None:
          line |= {"error": reason}
        else:
          line |= _as_json(caption)
          if config.sidecars:
            _write_sidecar(path, caption)
        part.write(_as_line(line))
      part.flush()
      bar.update(min(len(ids) * jax.process_count(), bar.total - bar.n))
  _sync("parts are written")
  if jax.process_index() == 0:
    num_bad, problem = _join(out, len(source))
  else:
    num_bad, problem = 0, ""
  # The others wait here for the first one, however long it takes.
  num_bad = multihost_utils.process_allgather(np.array(num_bad)).max()
  if num_bad == len(source):
    raise ValueError(
      f"{config.images}: none of {num_bad} images could be read{problem}"
    )
  log.info("Captions are in %s", out)
  return {"images": len(source), "unreadable": int(num_bad)}


def _sync(what: str) -> None:
  """Waits until all processes are here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"caption_images: {what}")


def _images(config: Config) -> str:
  if not config.images:
    raise ValueError(
      "config.images: nothing to caption; for example --config.images=FOLDER"
    )
  return config.images


def _settings(
  config: Config,
  dtype: str,
  model: model_lib.Model,
  source: Any,
  options: Mapping[str, Any],
) -> dict[str, Any]:
  """Everything that changes the lines."""
  prompt = model.card.prompt if config.prompt is None else config.prompt
  generation = {**model.card.generation, **options}
  params = model.params
  if jax.process_count() > 1:
    # No process holds all parts of all parameters.
    params = multihost_utils.process_allgather(params, tiled=True)
  return {
    "weights": snapshot.digest(params),
    "dtype": dtype,
    "image_size": list(model.card.config.vit.image_size),
    "tokenizer": config.tokenizer,
    "prompt": prompt,
    "seed": config.seed,
    **{f"generation.{key}": generation[key] for key in sorted(generation)},
    "images": config.images,
    "image_root": config.image_root,
    "num_images": len(source),
  }


def _begin(
  out: pathlib.Path, settings: Mapping[str, Any], source: Any
) -> Int[np.ndarray, " n"]:
  """Starts a job, or resumes it; returns the rows that have no line yet.

  Raises:
    ValueError: the job was started with other settings or other images.
  """
  job, parts = _job(out), _parts(out)
  if parts and resumable.settings(job) is None:
    raise ValueError(
      f"{parts[0]}: has captions of a job, but there is no {job.name} with its "
      "settings; delete the file to start again"
    )
  hint = (
    "Use the same settings, name another file with config.out, or delete "
    f"{job} and {out}.part* to start again"
  )
  resumable.begin(job, settings, hint, write=jax.process_index() == 0)
  rows = _rows_left(parts, source)
  # All processes have read before one of them writes.
  _sync("parts are read")
  return rows


def _rows_left(parts: list[pathlib.Path], source: Any) -> Int[np.ndarray, " n"]:
  """Rows that have no line in the parts of any process.

  What is damaged is captioned again.

  Raises:
    ValueError: the parts have captions of other images.
  """
  left = np.ones(len(source), bool)
  for part in parts:
    line = None
    for line in _sound_lines(part, len(source)):
      left[line["row"]] = False
    if line and sources.row_id(source, line["row"]) != line["id"]:
      raise ValueError(
        f"{part}: row {line['row']} is {line['id']!r}, but in config.images it "
        f"is {sources.row_id(source, line['row'])!r}; give the same images as "
        "before, or delete the file to start again"
      )
  return np.flatnonzero(left)


def _note(position: int, record: sources.Record) -> tuple[str, dict[str, Any]]:
  """The path of an image, and what its line says besides the record's id: the
  `image_id` if there is one, and the path if the id is not the end of it."""
  image_id, path = sources.image_id(record), sources.image_path(record)
  note = {} if image_id is None else {"image_id": image_id}
  if not (printable := files.printable(path)).endswith(record["id"]):
    note |= {"image": printable} if path else {}
  return path, note


def _numbered(
  batches: loader.EvalLoader,
) -> Iterator[tuple[range, list[str], dict[str, np.ndarray]]]:
  """This process's batches, with the positions of their rows in `todo`."""
  for number, (arrays, ids) in enumerate(batches):
    block = number * jax.process_count() + jax.process_index()
    start = block * len(ids)
    yield range(start, start + len(ids)), ids, arrays


def _as_json(caption: captioning.Caption) -> dict[str, Any]:
  line: dict[str, Any] = {
    "caption": caption.text,
    "log_prob": round(caption.log_prob, 4),
    "score": round(caption.score, 4),
  }
  if caption.others:
    line["others"] = [_as_json(other) for other in caption.others]
  return line


def _write_sidecar(image: str, caption: captioning.Caption) -> None:
  """Writes a text file next to an image, unless there is one: somebody may have
  written it by hand."""
  if not image:
    raise ValueError(
      "config.sidecars: text files can be written next to images in a folder "
      "only, and these images are in shards or tables; leave it out"
    )
  if text := folders.text_file(image):
    log.warning("%s exists and was left unchanged", files.printable(text))
    return
  texts = [one.text for one in (caption, *caption.others)]
  path = f"{os.path.splitext(image)[0]}.txt"
  files.write_text(path, "".join(f"{text}\n" for text in texts))


def _job(out: pathlib.Path) -> pathlib.Path:
  return out.with_name(f"{out.name}.job.json")


def _part(out: pathlib.Path, process: int) -> pathlib.Path:
  return out.with_name(f"{out.name}.part{process}")


def _parts(out: pathlib.Path) -> list[pathlib.Path]:
  return [
    out.with_name(name)
    for name in files.list_folder(out.parent)
    if name.startswith(f"{out.name}.part")
  ]


def _sound_lines(part: pathlib.Path, num_rows: int) -> Iterator[dict[str, Any]]:
  """The lines of a part that are complete and name a row and an image."""
  for line in files.json_lines(part):
    row, id = line.get("row"), line.get("id")
    if type(row) is int and 0 <= row < num_rows and isinstance(id, str):
      yield line


def _join(out: pathlib.Path, num_rows: int) -> tuple[int, str]:
  """Makes one file of all parts, in order of the rows, and removes the rest.

  If no image could be read, there is no file, and the next job tries again.

  Returns:
    The number of images that could not be read, and what is wrong with one.
  """
  parts = _parts(out)
  rows, num_bad, problem = [], 0, ""
  for part in parts:
    for line in _sound_lines(part, num_rows):
      rows.append(line["row"])
      if "error" in line:
        num_bad += 1
        problem = problem or f", such as {line['id']}: {line['error']}"
  if num_bad < len(rows):
    if len(parts) == 1 and _is_in_order(parts[0], rows):
      files.rename(parts[0], out)
    else:
      by_row = {
        line["row"]: line
        for part in parts
        for line in _sound_lines(part, num_rows)
      }
      lines = (_as_line(by_row[row]) for row in sorted(by_row))
      files.write_text(out, "".join(lines))
  for part in parts:
    files.remove(part)
  files.remove(_job(out))
  return num_bad, problem


def _is_in_order(part: pathlib.Path, rows: list[int]) -> bool:
  """Whether a part is what is wanted: all its lines sound, each row once."""
  num_lines = sum(1 for _ in files.complete_lines(part))
  return num_lines == len(rows) and all(
    row == number for number, row in enumerate(rows)
  )


def _as_line(line: dict[str, Any]) -> str:
  return json.dumps(line, ensure_ascii=False) + "\n"
