"""The job: captions every image of a collection and scores every text."""

import collections
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import pathlib
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

import blip_jax
from blip_jax.capfilt import label, rows
from blip_jax.capfilt import ledger as ledger_lib
from blip_jax.capfilt import work_units as work_units_lib
from blip_jax.data import sources
from blip_jax.inference import loading
from blip_jax.inference import model as model_lib
from blip_jax.runtime import files, json_files, sharding, snapshot
from blip_jax.runtime import progress as progress_lib
from blip_jax.runtime.config import Config

log = logging.getLogger(__name__)

# Images per device. Changes the last bits of scores, so it is part of the
# settings of a job. Fewer than `devices.images_per_batch`: the last batch of a
# work unit is padded, which wastes most of a large one if the unit is small.
_BATCH_SIZE_CPU, _BATCH_SIZE = 8, 64
# What `find_work_units` reads of the settings, as `json_files` writes types.
_SETTINGS = {
  "source": [str],
  "image_root": str,
  "web_texts": bool,
  "work_unit_rows": range(1, 2**53),
}
# Of a work unit whose input cannot be read, or changes while it is labelled.
_MAX_TRIES = 3


def run(config: Config, workdir: str) -> dict[str, int]:
  """Labels `config.source` into the folder `config.out`, by work units.

  Any number of processes, on hosts that share the folder, may run this at the
  same time; each takes work units that no other process has. Returns when all
  work units are done. The same command resumes a job that was stopped.

  Args:
    config: from `defaults.capfilt`.
    workdir: folder of the job if `config.out` is empty.

  Returns:
    The counts of `summary`.

  Raises:
    ValueError: there is nothing to label, no image can be used, the folder has
      a job with other settings, a model cannot do its task, or the input of a
      work unit cannot be read or keeps changing; says which option helps.
  """
  rows.arrow_and_schema()  # Fails now, and not after hours of work.
  if not 0 <= config.threshold <= 1:
    raise ValueError(
      f"config.threshold: expected 0 to 1, found {config.threshold}"
    )
  work_units = find_work_units(config)
  folder = files.as_path(config.out or workdir)
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
  ledger = ledger_lib.Ledger(folder, config.lease_seconds)
  ledger.begin(settings, config.force)
  _say_other_versions(ledger, work_units)
  constants = {key: settings[key] for key in ("captioner", "filter", "seed")}
  with (
    contextlib.closing(
      label.Labeller(
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
    ) as labeller,
    Progress(len(work_units), folder) as progress,
  ):
    label_all(
      work_units, labeller, ledger, config.threshold, constants, progress
    )
  results = summary(ledger, work_units)
  if results["images/in"] == results["images/bad"]:
    done_files = filter(None, map(ledger.done, work_units))
    problem = next(filter(None, map(_first_problem, done_files)), "")
    raise ValueError(f"config.source: no image can be used; {problem}")
  return results


def default_batch_size(is_cpu: bool) -> int:
  """Images per device, unless the config says how many."""
  return _BATCH_SIZE_CPU if is_cpu else _BATCH_SIZE


def _num_workers(config: Config) -> int:
  """Models on a CPU are slower than a thread that reads, and need all cores."""
  if config.num_workers >= 0:
    return config.num_workers
  return 0 if jax.default_backend() == "cpu" else len(os.sched_getaffinity(0))


class _Failures:
  """Work units that could not be done, though others can.

  Those are claimed again after all others; after `_MAX_TRIES` the job ends.
  """

  def __init__(self, ledger: ledger_lib.Ledger):
    self._ledger = ledger
    self._tries = collections.Counter()

  @contextlib.contextmanager
  def of(self, work_unit: work_units_lib.WorkUnit) -> Iterator[None]:
    try:
      yield
    except work_units_lib.Unusable as error:
      self._ledger.give_back(work_unit)
      self._tries[work_unit.name] += 1
      log.warning("%s is not done: %s", work_unit.name, error)
      if self._tries[work_unit.name] == _MAX_TRIES:
        names = sorted(self._tries)
        raise ValueError(
          f"config.source: {len(names)} work units could not be done in "
          f"{_MAX_TRIES} tries, such as {names[:3]}; the others are. {error}. "
          "Run the same command again once that is mended"
        ) from error

  def forget(self, work_unit: work_units_lib.WorkUnit) -> None:
    """It is done."""
    self._tries.pop(work_unit.name, None)


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
    "captioner": captioner and snapshot.digest(captioner.params)[:16],
    "filter": snapshot.digest(filter_model.params)[:16],
    "seed": config.seed,
    "threshold": config.threshold,
    "prompt": prompt,
    "generation": options,
    "dtype": filter_model.card.config.vit.dtype,
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


def _made_with() -> dict[str, str]:
  """What may change the last bits of scores, and is not refused."""
  return {"jax": jax.__version__, "platform": jax.default_backend()}


def _say_other_versions(
  ledger: ledger_lib.Ledger, work_units: Sequence[work_units_lib.WorkUnit]
) -> None:
  now = _made_with()
  for done in filter(None, map(ledger.done, work_units)):
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


def _first_problem(done: Mapping[str, Any]) -> str:
  """The first problem in a done-file; "" if there is none."""
  bad = (f"{key}: {why}" for key, why in done["bad"].items())
  return next(iter((*done["damage"], *bad)), "")


def find_work_units(settings: Any) -> list[work_units_lib.WorkUnit]:
  """The work units of a config, or of the settings of a job."""
  return work_units_lib.find(
    tuple(settings["source"]),
    settings["image_root"],
    settings["web_texts"],
    settings["work_unit_rows"],
  )


def work_units_of(
  ledger: ledger_lib.Ledger,
) -> list[work_units_lib.WorkUnit]:
  """The work units of a job that was started.

  Raises:
    ValueError: the folder holds no job, its settings are damaged, or its input
      is gone.
  """
  settings = ledger.settings
  if problem := json_files.problem(settings, _SETTINGS, complete=True):
    path = ledger.folder / "job.json"
    raise files.DamagedFile(path, problem, ledger_lib.RESTORE)
  return find_work_units(settings)


@dataclasses.dataclass(frozen=True)
class Opened:
  """A work unit that is leased to this process, and what is known of it so far.

  Attributes:
    work_unit: which.
    num_done: work units of the job that are done before it.
    before: its input when it was opened.
    num_images: that it has.
    counts: of the images that are labelled.
    text_rows: of these images.
  """

  work_unit: work_units_lib.WorkUnit
  num_done: int
  before: work_units_lib.Input
  num_images: int
  counts: rows.Counts
  text_rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def label_all(
  work_units: Sequence[work_units_lib.WorkUnit],
  labeller: label.Labeller,
  ledger: ledger_lib.Ledger,
  threshold: float,
  constants: dict[str, Any],
  progress: "Progress",
) -> None:
  """Labels all work units that no other process does, and writes their files.

  Args:
    work_units: of the job.
    labeller: the models.
    ledger: of the job, which has begun.
    threshold: the least `itm_prob` of a text that is kept.
    constants: columns that are equal in all rows: captioner, filter, seed.
    progress: shown meanwhile.

  Raises:
    ValueError: a work unit could not be done in several tries.
  """
  failures = _Failures(ledger)
  with contextlib.closing(ledger.claims(work_units)) as claims:
    for first in claims:
      assert first is not None  # nothing is held here
      # Up to a None, where this process has to finish what it has.
      more = iter(lambda: next(claims, None), None)
      opened = _open_all(itertools.chain([first], more), ledger, failures)
      with contextlib.closing(labeller(opened)) as batches:
        for batch in batches:
          unit = batch.work_unit
          progress.show(unit)
          for image in batch.labelled:
            image_rows = [*rows.of_image(image, threshold, constants)]
            unit.counts.add(image, image_rows)
            unit.text_rows.extend(image_rows)
          progress.add(len(batch.labelled), unit.counts)
          ledger.progress()
          if batch.is_last:
            with failures.of(unit.work_unit):
              finish(unit, ledger, constants)
              failures.forget(unit.work_unit)
              progress.end(unit.counts, labeller.readers.images_per_core)


def _open_all(
  claims: Iterable[tuple[work_units_lib.WorkUnit, int]],
  ledger: ledger_lib.Ledger,
  failures: _Failures,
) -> Iterator[tuple[Opened, sources.Rows]]:
  """Opens what is claimed, except for what cannot be read."""
  for work_unit, num_done in claims:
    opened = None
    with failures.of(work_unit):
      ledger.check_paths(work_unit)
      before = work_unit.input()
      source, damage = work_unit.open()
      counts = rows.Counts(damage)
      opened = Opened(work_unit, num_done, before, len(source), counts), source
    if opened is not None:
      yield opened


def finish(
  unit: Opened, ledger: ledger_lib.Ledger, constants: dict[str, Any]
) -> None:
  """Writes the files of a work unit whose images are all labelled.

  Raises:
    work_units.Unusable: its input is another one now than when it was opened,
      or cannot be read; nothing is written.
  """
  report = {
    "work_unit": unit.work_unit.name,
    "input": unit.before.as_json(),
    "version": blip_jax.__version__,
    "made_with": _made_with(),
    **constants,
    **unit.counts.as_json(),
  }
  table = rows.to_parquet(unit.text_rows)
  unit.work_unit.check_unchanged(unit.before)
  ledger.finish(unit.work_unit, table, report)


def summary(
  ledger: ledger_lib.Ledger, work_units: Sequence[work_units_lib.WorkUnit]
) -> dict[str, int]:
  """Counts over all work units that are done.

  Returns:
    `work_units`, `work_units_done`, and `<kind>/<outcome>` for images, web and
    synthetic texts, and the outcomes in, kept, dropped and bad.
  """
  done_files = [*filter(None, map(ledger.done, work_units))]
  results = {
    "work_units": len(work_units),
    "work_units_done": len(done_files),
  }
  for outcome in ("in", "kept", "dropped", "bad"):
    results[f"images/{outcome}"] = sum(
      done["images"][outcome] for done in done_files
    )
    for source in (label.WEB, label.SYNTHETIC):
      results[f"{source}/{outcome}"] = sum(
        done["texts"][source][outcome] for done in done_files
      )
  return results


class Progress:
  """Shows a progress bar, and logs the finished work units of this process.

  The bar shows the done work units, images per second, the share of texts that
  are kept, and the time left. The log is `FOLDER/log/HOST-PID.jsonl`.

  Args:
    num_work_units: of the job.
    folder: of the job.
  """

  def __init__(self, num_work_units: int, folder: pathlib.PurePath):
    self._bar = progress_lib.bar(
      total=num_work_units,
      unit="work unit",
      bar_format="{percentage:3.0f}%|{bar:20}| {n:.1f}/{total} work units, "
      "{remaining} left{postfix}",
    )
    log_folder = folder / "log"
    files.make_folder(log_folder)
    self._path = log_folder / f"{socket.gethostname()}-{os.getpid()}.jsonl"
    self._num_images = 0
    self._start = time.monotonic()
    self._unit: Opened | None = None

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_) -> None:
    self._bar.close()

  def show(self, unit: Opened) -> None:
    """Says whose images follow, if they are of another work unit."""
    if unit is self._unit:
      return
    self._unit = unit
    self._unit_start = time.monotonic()
    self._bar.n = unit.num_done
    self._bar.refresh()

  def add(self, num_images: int, counts: rows.Counts) -> None:
    """Shows that images of the current work unit were labelled.

    Args:
      num_images: since the last call.
      counts: of the work unit so far.
    """
    self._num_images += num_images
    speed = self._num_images / (time.monotonic() - self._start)
    num_texts = sum(texts["in"] for texts in counts.texts.values())
    num_kept = sum(texts["kept"] for texts in counts.texts.values())
    self._bar.set_postfix_str(
      f"{speed:.1f} images/s, {num_kept / max(num_texts, 1):.0%} of texts kept",
      refresh=False,
    )
    assert self._unit is not None
    share = num_images / max(self._unit.num_images, 1)
    self._bar.update(min(share, self._bar.total - self._bar.n))

  def end(self, counts: rows.Counts, images_per_core: float) -> None:
    """Logs that the current work unit is done.

    Args:
      counts: of the work unit.
      images_per_core: read by this process so far, per second of processor
        time.
    """
    assert self._unit is not None
    seconds = time.monotonic() - self._unit_start
    line = {
      "work_unit": self._unit.work_unit.name,
      "images": counts.images["in"],
      "seconds": round(seconds, 3),
      "images_per_core": round(images_per_core, 1),
    }
    files.append_line(self._path, json.dumps(line))
