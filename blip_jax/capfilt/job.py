"""The job: captions every image of a collection and scores every text."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from blip_jax import defaults
from blip_jax.capfilt import label, rows
from blip_jax.capfilt import ledger as ledger_lib
from blip_jax.capfilt import work_units as work_units_lib
from blip_jax.capfilt.engines import array, local, ray
from blip_jax.runtime import files, json_files, processes
from blip_jax.runtime.command import UsageError
from blip_jax.runtime.config import Config

log = logging.getLogger(__name__)

# Who hands out work units. Each does, or has others do, what it has to do, and
# returns which work units these were.
ENGINES = {"local": local.run, "ray": ray.run, "array": array.run}
# What `find_work_units` reads of the settings, as `json_files` writes types.
_SETTINGS = {
  "source": [str],
  "image_root": str,
  "web_texts": bool,
  "work_unit_rows": range(1, 2**53),
}


def run(config: Config, workdir: str) -> dict[str, int]:
  """Labels `config.source` into the folder `config.out`, by work units.

  `config.engine` says who hands the work units out. Any number of processes may
  run this at the same time. Returns when all work units are done, or, if the
  process is a task of an array, those of the task. The same command resumes a
  job that was stopped.

  Args:
    config: from `defaults.capfilt`.
    workdir: folder of the job if `config.out` is empty.

  Returns:
    The counts of `summary`.

  Raises:
    UsageError: there is no such engine, or it lacks what it needs.
    ValueError: there is nothing to label, no image can be used, the folder has
      a job with other settings, a model cannot do its task, or the input of a
      work unit cannot be read or keeps changing; says which option helps.
  """
  rows.arrow_and_schema()  # Fails now, and not after hours of work.
  if not 0 <= config.threshold <= 1:
    raise ValueError(
      f"config.threshold: expected 0 to 1, found {config.threshold}"
    )
  engine = _engine(config)
  work_units = find_work_units(config)
  folder = files.as_path(config.out or workdir)
  own = engine(config, folder, work_units)
  ledger = ledger_lib.Ledger(folder)
  results = summary(ledger, own)
  if own and results["images/in"] == results["images/bad"]:
    done_files = ledger.all_done(own).values()
    problem = next(filter(None, map(_first_problem, done_files)), "")
    text = f"config.source: no image can be used; {problem}"
    if len(own) == len(work_units):
      raise ValueError(text)
    log.warning("Of the work units of this task: %s", text)
  return results


def _engine(config: Config) -> Any:
  name = config.engine
  if name not in ENGINES:
    raise UsageError(
      f"config.engine: expected one of {[*ENGINES]}, found {name!r}"
    )
  own = defaults.capfilt()
  for engine in ("array", "ray"):
    for key, value in config[engine].items():
      if name != engine and value != own[engine][key]:
        raise UsageError(
          f"config.{engine}.{key}={value}: of config.engine={engine}, found "
          f"config.engine={name}"
        )
  if name != "local" and processes.has_peers():
    raise UsageError(
      f"config.engine={name} hands work units to processes that do not join; "
      "leave out --distributed"
    )
  return ENGINES[name]


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


def summary(
  ledger: ledger_lib.Ledger, work_units: Sequence[work_units_lib.WorkUnit]
) -> dict[str, int]:
  """Counts over all work units that are done.

  Returns:
    `work_units`, `work_units_done`, and `<kind>/<outcome>` for images, web and
    synthetic texts, and the outcomes in, kept, dropped and bad.
  """
  done_files = [*ledger.all_done(work_units).values()]
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
