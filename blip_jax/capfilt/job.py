"""The job: every picture of a collection captioned, every text judged."""

import json
import logging
import os
import pathlib
import socket
import time
from collections.abc import Sequence
from typing import Any

import jax
import tqdm
from ml_collections import ConfigDict

import blip_jax
from blip_jax.capfilt import (
  label,
  ledger,
  rows,
  work_units,
)
from blip_jax.inference import model as model_lib
from blip_jax.runtime import sharding, snapshot

log = logging.getLogger(__name__)

# Pictures that a device computes at once. Part of what makes the last bits of a
# score, and so of the settings.
_BUCKET_CPU, _BUCKET = 8, 64


def run(config: ConfigDict, workdir: str) -> dict[str, int]:
  """Captions and judges `config.source` into `config.out`, unit by unit.

  Any number of processes may run this at once, on hosts that share the folder;
  each takes units that no other has. It ends when all units are done. Started
  again it goes on with those that are not.

  Args:
    config: from `config.capfilt`.
    workdir: where the job is if the config does not say.

  Raises:
    ValueError: there is nothing to do, the folder has a job of other settings,
      or a model cannot do what it is there for; says which option helps.
  """
  rows.arrow_and_schema()  # before hours of work: it is an extra
  todo = units_of(config)
  folder = pathlib.Path(config.out or workdir)
  folder.mkdir(parents=True, exist_ok=True)
  # Of this process alone: units, and not rows of a batch, are what hosts share.
  mesh = sharding.make_mesh(config.mesh, jax.local_devices())
  load = lambda name, task: model_lib.load(
    name,
    task=task,
    dtype=config.dtype or model_lib.quick_dtype(),
    mesh=mesh,
    tokenizer=config.tokenizer or None,
  )
  judge = load(config.filter, "itm")
  captioner = load(config.captioner, "caption") if config.captioner else None
  batch_size = config.per_device_batch_size or (
    _BUCKET_CPU if jax.default_backend() == "cpu" else _BUCKET
  )
  generation = {k: v for k, v in config.generation.items() if v is not None}
  models = {
    "captioner": captioner and snapshot.digest(captioner.params)[:16],
    "filter": snapshot.digest(judge.params)[:16],
  }
  book = ledger.Ledger(folder, config.lease_seconds)
  book.begin(
    {
      **models,
      "seed": config.seed,
      "threshold": config.threshold,
      "prompt": config.prompt,
      "generation": generation,
      "dtype": judge.card.config.vit.dtype,
      "batch_size": batch_size * sharding.num_data_shards(mesh),
      "image_sizes": [
        list(model.image.size) for model in (captioner, judge) if model
      ],
      "source": list(config.source),
      "image_root": config.image_root,
      "work_unit_rows": config.work_unit_rows,
      "web_texts": config.web_texts,
    },
    config.force,
  )
  labeller = label.Labeller(
    captioner,
    judge,
    seed=config.seed,
    per_device_batch_size=batch_size,
    generation=generation,
    prompt=config.prompt,
    num_threads=config.num_threads,
  )
  constant = {**models, "seed": config.seed}
  with Progress(len(todo), folder) as progress:
    for unit, number_done in book.claims(todo):
      progress.done(number_done)
      do(unit, labeller, book, config.threshold, constant, progress)
  found = summary(book, todo)
  if found["pictures/in"] == found["pictures/bad"]:
    first = next(filter(None, map(_problem, map(book.done, todo))), "")
    raise ValueError(f"config.source: no picture could be used; {first}")
  return found


def _problem(told: dict[str, Any]) -> str:
  """The first that a unit had; "" if there was none."""
  bad = (f"{key}: {why}" for key, why in told["bad"].items())
  return next(iter((*told["damage"], *bad)), "")


def units_of(settings: Any) -> list[work_units.WorkUnit]:
  """The units that a config names, or the settings of a job."""
  return work_units.find(
    tuple(settings["source"]),
    settings["image_root"],
    settings["web_texts"],
    settings["work_unit_rows"],
  )


def do(
  unit: work_units.WorkUnit,
  labeller: label.Labeller,
  book: ledger.Ledger,
  threshold: float,
  constant: dict[str, Any],
  progress: "Progress",
) -> None:
  """One unit, from its pictures to its files."""
  fingerprint = unit.fingerprint()
  source, damage = unit.open()
  counts, found = rows.Counts(damage), []
  progress.begin(unit, len(source))
  for pictures in labeller(source):
    for picture in pictures:
      own = [*rows.of_picture(picture, threshold, constant)]
      counts.add(picture, own)
      found += own
    progress.add(len(pictures), counts)
  told = {
    "unit": unit.name,
    "input": fingerprint,
    "version": blip_jax.__version__,
    **constant,
    **counts.as_json(),
  }
  book.finish(unit, rows.to_parquet(found), told)
  progress.end(counts)


def summary(
  book: ledger.Ledger, todo: Sequence[work_units.WorkUnit]
) -> dict[str, int]:
  """Counts over all units that are done."""
  done = [told for unit in todo if (told := book.done(unit)) is not None]
  found = {"units": len(todo), "units_done": len(done)}
  for fate in ("in", "kept", "dropped", "bad"):
    found[f"pictures/{fate}"] = sum(told["pictures"][fate] for told in done)
    for source in (label.WEB, label.SYNTHETIC):
      found[f"{source}/{fate}"] = sum(
        told["texts"][source][fate] for told in done
      )
  return found


class Progress:
  """A bar over units with pictures/s, the share of texts kept and the time
  left; and a log of this process in the job's folder."""

  def __init__(self, number: int, folder: pathlib.Path):
    self._bar = tqdm.tqdm(
      total=number,
      unit="unit",
      bar_format="{percentage:3.0f}%|{bar:20}| {n:.1f}/{total} units, "
      "{remaining} left{postfix}",
    )
    log_folder = folder / "log"
    log_folder.mkdir(exist_ok=True)
    self._path = log_folder / f"{socket.gethostname()}-{os.getpid()}.jsonl"
    self._pictures = 0
    self._start = time.monotonic()

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_) -> None:
    self._bar.close()

  def done(self, number: int) -> None:
    """Takes note of how many units are done, by whomever."""
    self._bar.n = number
    self._bar.refresh()

  def begin(self, unit: work_units.WorkUnit, num_pictures: int) -> None:
    self._unit, self._size = unit, num_pictures
    self._unit_start = time.monotonic()

  def add(self, number: int, counts: rows.Counts) -> None:
    self._pictures += number
    speed = self._pictures / (time.monotonic() - self._start)
    texts = sum(of["in"] for of in counts.texts.values())
    kept = sum(of["kept"] for of in counts.texts.values())
    self._bar.set_postfix_str(
      f"{speed:.1f} pictures/s, {kept / max(texts, 1):.0%} of texts kept",
      refresh=False,
    )
    self._bar.update(min(number / self._size, self._bar.total - self._bar.n))

  def end(self, counts: rows.Counts) -> None:
    seconds = time.monotonic() - self._unit_start
    line = {
      "unit": self._unit.name,
      "pictures": counts.pictures["in"],
      "seconds": round(seconds, 3),
    }
    with open(self._path, "a", encoding="utf-8") as file:
      file.write(json.dumps(line) + "\n")
