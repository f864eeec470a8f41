"""A process that labels work units: its models, and the settings of its job."""

import contextlib
import dataclasses
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from blip_jax.capfilt import label, loop
from blip_jax.capfilt.engines.handout import Handout
from blip_jax.capfilt.ledger import Ledger
from blip_jax.capfilt.progress import Progress
from blip_jax.capfilt.work_units import WorkUnit
from blip_jax.inference import loading
from blip_jax.inference import model as model_lib
from blip_jax.runtime import files, saved_arrays, sharding
from blip_jax.runtime.config import Config

log = logging.getLogger(__name__)

# Images per device. Changes the last bits of scores, so it is part of the
# settings of a job. Fewer than `devices.images_per_batch`: the last batch of a
# work unit is padded, which wastes most of a large one if the unit is small.
_BATCH_SIZE_CPU, _BATCH_SIZE = 8, 64


@dataclasses.dataclass(frozen=True)
class Worker:
  """Labels what is handed out to it.

  Attributes:
    ledger: of the job, which has begun.
    labeller: captioner and filter on the devices of this process.
    threshold: the least `itm_prob` of a text that is kept.
    constants: columns that are equal in all rows: captioner, filter, seed.
  """

  ledger: Ledger
  labeller: label.Labeller
  threshold: float
  constants: dict[str, Any]

  def label_all(self, handout: Handout, progress: Progress) -> None:
    """Labels all that is handed out; see `loop.label_all`."""
    loop.label_all(
      handout,
      self.labeller,
      self.ledger,
      self.threshold,
      self.constants,
      progress,
    )


@contextlib.contextmanager
def started(
  config: Config, folder: pathlib.PurePath, work_units: Sequence[WorkUnit]
) -> Iterator[Worker]:
  """Loads the models, and starts the job or joins it.

  Args:
    config: of the job.
    folder: of its files; created if there is none.
    work_units: that may be done already, by another version of JAX.

  Raises:
    ValueError: the folder has a job with other settings, or a model cannot do
      its task.
  """
  files.make_folder(folder)
  # Of this process alone: hosts share work units, not batches.
  mesh = sharding.make_mesh(config.mesh, jax.local_devices())
  load = lambda name, task: loading.load(
    name,
    task=task,
    dtype=config.dtype or loading.quick_dtype(),
    mesh=mesh,
    tokenizer=config.tokenizer or None,
  )
  filter_model = load(config.filter, "itm")
  captioner = load(config.captioner, "caption") if config.captioner else None
  batch_size = config.per_device_batch_size or default_batch_size(
    jax.default_backend() == "cpu"
  )
  generation = {k: v for k, v in config.generation.items() if v is not None}
  settings = _settings(config, captioner, filter_model, generation, batch_size)
  ledger = Ledger(folder)
  ledger.begin(settings, config.force)
  _say_other_versions(ledger, work_units)
  labeller = label.Labeller(
    captioner,
    filter_model,
    seed=config.seed,
    per_device_batch_size=batch_size,
    generation=generation,
    prompt=config.prompt,
    num_threads=config.num_threads,
    num_workers=_num_workers(config),
    scaled_jpeg=config.scaled_jpeg,
  )
  constants = {key: settings[key] for key in ("captioner", "filter", "seed")}
  with contextlib.closing(labeller):
    yield Worker(ledger, labeller, config.threshold, constants)


def default_batch_size(is_cpu: bool) -> int:
  """Images per device, unless the config says how many."""
  return _BATCH_SIZE_CPU if is_cpu else _BATCH_SIZE


def _settings(
  config: Config,
  captioner: model_lib.Model | None,
  filter_model: model_lib.Model,
  generation: Mapping[str, Any],
  batch_size: int,
) -> dict[str, Any]:
  """Everything that decides the bytes of the rows, and nothing else."""
  models = [model for model in (captioner, filter_model) if model]
  prompt, options = None, {}
  if captioner is not None:
    card = captioner.card
    prompt = card.prompt if config.prompt is None else config.prompt
    options = {**card.generation, **generation}
  mesh = filter_model.mesh
  return {
    "captioner": captioner and saved_arrays.digest(captioner.params)[:16],
    "filter": saved_arrays.digest(filter_model.params)[:16],
    "seed": config.seed,
    "threshold": config.threshold,
    "prompt": prompt,
    "generation": options,
    "dtype": filter_model.dtype,
    "batch_size": batch_size * sharding.num_data_shards(mesh),
    "mesh": dict(mesh.shape),
    "image_sizes": [list(m.card.config.vit.image_size) for m in models],
    # No shape of the weights says these.
    "num_heads": [
      [m.card.config.vit.num_heads, m.card.config.med.num_heads] for m in models
    ],
    "vocabularies": [m.tokenizer and m.tokenizer.digest() for m in models],
    "source": list(config.source),
    "image_root": config.image_root,
    "work_unit_rows": config.work_unit_rows,
    "web_texts": config.web_texts,
    # Jobs of earlier versions lack it.
    **({"scaled_jpeg": True} if config.scaled_jpeg else {}),
  }


def _say_other_versions(ledger: Ledger, work_units: Sequence[WorkUnit]) -> None:
  now = loop.made_with()
  for done in ledger.all_done(work_units).values():
    there = done.get("made_with", now)
    changes = [
      f"{key} {there.get(key)} there, {now[key]} now"
      for key in now
      if there.get(key) != now[key]
    ]
    if changes:
      log.warning(
        "%s: work units were done with %s; the last bits of scores may differ",
        ledger.folder,
        "; ".join(changes),
      )
      return


def _num_workers(config: Config) -> int:
  """Models on a CPU are slower than a thread that reads, and need all cores."""
  if config.num_workers >= 0:
    return config.num_workers
  return 0 if jax.default_backend() == "cpu" else len(os.sched_getaffinity(0))
