"""Caption a folder of images, or tar shards (job `caption`).

The lines that are written, see `caption_lines`, and the settings of the job in
`<out>.job.json` let a job that was stopped resume. These stay beside the result
and say what it was made with.
"""

import functools
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
from blip_jax.inference import caption_lines, captioning, stamps
from blip_jax.inference import model as model_lib
from blip_jax.runtime import config as run_config
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

# What a line says of its image besides the id.
_NOTED = ("image_id", "image", caption_lines.STAMP)
# In `<out>.job.json` once the job is done, besides the settings.
_RESULT = "sha256"
_MAX_LOGGED = 20  # text files that could not be written, by name


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
    The number of images, of those that could not be read, and of text files
    that could not be written, if there are any.

  Raises:
    ValueError: there are no images, none can be read, the model does not
      generate captions, an option is out of range, another job writes into
      `config.out`, the job was started with other settings, or `config.out`
      has something else than the captions of these images; says which.
  """
  run_config.at_least(1, config, "batch_size", "num_threads")
  source = datasets.open_images(_images(config), config.image_root)
  out = pathlib.Path(config.out or os.path.join(workdir, "captions.jsonl"))
  with lock.hold(lock.path_for(out)) as held:
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
  settings = _settings(config, dtype, model, source, options)
  if files.exists(out):
    _check_finished(out, settings, source)
    log.warning("%s is complete; delete it to caption the images again", out)
    return {"images": len(source)}
  known = stamps.Stamps(source)
  rows = _begin(out, settings, source, known)
  todo = sources.Noted(
    sources.Rows(source, rows),
    lambda _, record: (sources.image_path(record), _note(record, known)),
  )
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
  num_unwritten = 0
  part_path = caption_lines.part(out, jax.process_index())
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
          if config.sidecars and (problem := _write_sidecar(path, caption)):
            num_unwritten += 1
            if num_unwritten <= _MAX_LOGGED:
              log.warning("Not written: %s", problem)
        part.write(caption_lines.as_text(line))
      part.flush()
      bar.update(min(len(ids) * jax.process_count(), bar.total - bar.n))
  _sync("parts are written")
  if jax.process_index() == 0:
    num_bad, problem = caption_lines.join(out, len(source))
    _finish(out, settings)
  else:
    num_bad, problem = 0, ""
  # The others wait here for the first one, however long it takes.
  counts = multihost_utils.process_allgather(np.array([num_bad, num_unwritten]))
  num_bad, num_unwritten = counts.reshape(-1, 2).sum(axis=0).tolist()
  if num_bad == len(source):
    raise ValueError(
      f"{config.images}: none of {num_bad} images could be read{problem}"
    )
  log.info("Captions are in %s", out)
  results = {"images": len(source), "unreadable": num_bad}
  if num_unwritten:
    log.warning("%d text files could not be written", num_unwritten)
    results["unwritten_text_files"] = num_unwritten
  return results


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
  out: pathlib.Path,
  settings: Mapping[str, Any],
  source: Any,
  known: stamps.Stamps,
) -> Int[np.ndarray, " n"]:
  """Starts a job, or resumes it; returns the rows that have no line yet.

  Lines that are damaged, or of images that have changed, are dropped.

  Raises:
    ValueError: the job was started with other settings.
  """
  job, parts = _job(out), caption_lines.parts(out)
  if parts and not files.exists(job):
    found = next(iter(parts.values()))
    raise ValueError(
      f"{found}: has captions of a job, but there is no {job.name} with its "
      "settings; delete the file to start again"
    )
  hint = (
    "Use the same settings, name another file with config.out, or delete "
    f"{job} and the files {out}.part<number> to start again"
  )
  process, count = jax.process_index(), jax.process_count()
  # Of a result that somebody has deleted, the settings are of no use.
  is_over = not parts and _RESULT in (resumable.settings(job) or {})
  resumable.begin(job, settings, hint, is_over, write=process == 0)
  is_current = functools.partial(_is_current, source=source, known=known)
  rows, wrong = caption_lines.unfinished(parts, len(source), is_current)
  # All processes have read before one of them writes.
  _sync("parts are read")
  for number, part in parts.items():
    if number % count == process:
      caption_lines.clean(part, wrong[number])
  return rows


def _finish(out: pathlib.Path, settings: Mapping[str, Any]) -> None:
  """Notes what the result is, beside what made it."""
  if files.exists(out):
    files.write_json(_job(out), {**settings, _RESULT: files.sha256(out)})
  else:  # no image could be read
    files.remove(_job(out))


def _check_finished(
  out: pathlib.Path, settings: Mapping[str, Any], source: Any
) -> None:
  """Checks that this job would write what is there.

  Raises:
    ValueError: other settings made it, or it is cut or damaged.
  """
  caption_lines.check_complete(out, source)
  there = resumable.settings(job := _job(out))
  if there is None:
    log.warning("%s is missing: nobody knows what model made %s", job, out)
    return
  sha256 = there.pop(_RESULT, None)
  hint = f"Name another file with config.out, or delete {out} to start again"
  resumable.refuse_others(job, there, resumable.as_read(settings), hint)
  if sha256 is None:  # stopped between the two files
    _finish(out, settings)
  elif sha256 != (found := files.sha256(out)):
    raise files.DamagedFile(
      out,
      f"its SHA-256 is {found}, and was {sha256} when it was written",
      f"Delete it to caption the images again, or {job} if you have changed it",
    )


def _is_current(
  line: caption_lines.Line, source: Any, known: stamps.Stamps
) -> bool:
  """Whether a line says of its row's image what it would say now."""
  row = line["row"]
  if line["id"] != sources.row_id(source, row):
    return False
  if line.get(caption_lines.STAMP) == known.of_shards:
    return True  # to read the row would be to read its image
  try:
    now = _note(source[row], known)
  except sources.BadRow:
    now = {}
  return all(line.get(key) == now.get(key) for key in _NOTED)


def _note(record: sources.Record, known: stamps.Stamps) -> dict[str, Any]:
  """What a line says besides the record's id: the `image_id` if there is one,
  the path if the id is not the end of it, and the stamp of the image."""
  image_id, path = sources.image_id(record), sources.image_path(record)
  note: dict[str, Any] = {caption_lines.STAMP: known.of(record)}
  if image_id is not None:
    note["image_id"] = image_id
  if path and not (printable := files.printable(path)).endswith(record["id"]):
    note["image"] = printable
  return note


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


def _write_sidecar(image: str, caption: captioning.Caption) -> str:
  """Writes a text file next to an image, unless there is one: somebody may have
  written it by hand. Returns what is wrong if it cannot be written."""
  if not image:
    raise ValueError(
      "config.sidecars: text files can be written next to images in a folder "
      "only, and these images are in shards or tables; leave it out"
    )
  if text := folders.text_file(image):
    log.warning("%s exists and was left unchanged", files.printable(text))
    return ""
  texts = [one.text for one in (caption, *caption.others)]
  path = f"{os.path.splitext(image)[0]}.txt"
  try:
    files.write_text(path, "".join(f"{text}\n" for text in texts))
  except Exception as error:
    if rejects.hits_all(error):
      raise
    return files.one_line(f"{path}: {error}")
  return ""


def _job(out: pathlib.Path) -> pathlib.Path:
  return out.with_name(f"{out.name}.job.json")
