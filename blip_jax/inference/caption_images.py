"""Caption a folder of images or videos, or tar shards (job `caption`); see
`line_job`."""

import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from blip_jax.data import datasets, examples, folders, rejects
from blip_jax.inference import captioning, line_job, lines, loading
from blip_jax.inference import model as model_lib
from blip_jax.runtime import config as run_config
from blip_jax.runtime import devices, files, lock, sharding
from blip_jax.runtime.config import Config

log = logging.getLogger(__name__)

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
  run_config.at_least(0, config, "batch_size", "num_frames")
  run_config.at_least(1, config, "num_threads")
  open_all = datasets.open_videos if config.num_frames else datasets.open_images
  source = open_all(_images(config), config.image_root)
  out = files.as_path(config.out or os.path.join(workdir, "captions.jsonl"))
  with lock.hold(lock.path_for(out)) as held:
    return _caption(config, source, out, held)


def _caption(
  config: Config, source: Any, out: pathlib.PurePath, held: lock.Lock
) -> dict[str, int]:
  """Captions the images that have no line yet, and makes one file of all."""
  mesh = sharding.make_mesh(config.mesh)
  dtype = config.dtype or loading.quick_dtype()
  model = loading.load(
    config.model,
    task="caption",
    dtype=dtype,
    mesh=mesh,
    tokenizer=config.tokenizer or None,
  )
  options = {k: v for k, v in config.generation.items() if v is not None}
  generate = model.captioner(config.prompt, **options)
  settings = _settings(config, dtype, model, source, options)
  num_unwritten = 0

  def write_sidecar(path: str, line: lines.Line) -> None:
    nonlocal num_unwritten
    if problem := _write_sidecar(path, line):
      num_unwritten += 1
      if num_unwritten <= _MAX_LOGGED:
        log.warning("Not written: %s", problem)

  example = examples.ImageExample(model.image, num_frames=config.num_frames)
  batch_size = config.batch_size or devices.images_per_batch(
    mesh.devices, config.num_frames
  )
  job = line_job.LineJob(
    source=source,
    name=config.images,
    out=out,
    settings=settings,
    work=lambda left: line_job.Work(left, example, batch_size),
    respond=lambda arrays: [
      _as_json(caption) for caption in generate(arrays["image"], config.seed)
    ],
    mesh=mesh,
    num_threads=config.num_threads,
    after=write_sidecar if config.sidecars else None,
  )
  results = job.run(held)
  counts = multihost_utils.process_allgather(np.array([num_unwritten]))
  if num_unwritten := int(counts.sum()):
    log.warning("%d text files could not be written", num_unwritten)
    results["unwritten_text_files"] = num_unwritten
  return results


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
  return {
    **line_job.model_settings(model, dtype),
    "tokenizer": config.tokenizer,
    "prompt": prompt,
    "seed": config.seed,
    "num_frames": config.num_frames,
    **{f"generation.{key}": generation[key] for key in sorted(generation)},
    "images": config.images,
    "image_root": config.image_root,
    "num_images": len(source),
  }


def _as_json(caption: captioning.Caption) -> dict[str, Any]:
  line: dict[str, Any] = {
    "caption": caption.text,
    "log_prob": round(caption.log_prob, 4),
    "score": round(caption.score, 4),
  }
  if caption.others:
    line["others"] = [_as_json(other) for other in caption.others]
  return line


def _write_sidecar(image: str, line: lines.Line) -> str:
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
  texts = [one["caption"] for one in (line, *line.get("others", []))]
  path = f"{os.path.splitext(image)[0]}.txt"
  try:
    files.write_text(path, "".join(f"{text}\n" for text in texts))
  except Exception as error:
    if rejects.hits_all(error):
      raise
    return files.one_line(f"{path}: {error}")
  return ""
