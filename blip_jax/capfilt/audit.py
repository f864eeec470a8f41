"""How far a job is (`status`), and whether its files are intact (`verify`)."""

import collections
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from blip_jax.capfilt import job, rows
from blip_jax.capfilt import progress as progress_lib
from blip_jax.capfilt.engines import local
from blip_jax.capfilt.ledger import Ledger
from blip_jax.capfilt.work_units import WorkUnit
from blip_jax.runtime import command, files, progress
from blip_jax.runtime.config import Config

log = logging.getLogger(__name__)

_MAX_LISTED = 50


def status(config: Config, workdir: str) -> dict[str, int]:
  """Logs which process works on what, or did, and counts what is done.

  Args:
    config: from `defaults.capfilt`.
    workdir: folder of the job if `config.out` is empty.

  Returns:
    The counts of `job.summary`, and how many work units are damaged; the log
    names their files.

  Raises:
    ValueError: the folder holds no job.
  """
  ledger = Ledger(config.out or workdir)
  work_units = job.work_units_of(ledger)
  for name, owner in local.owners(ledger.folder).items():
    log.info("%s: leased to %s", name, owner)
  logged = progress_lib.logged(ledger.folder)
  for process, (units, images, seconds) in [*logged.items()][:_MAX_LISTED]:
    log.info(
      "%s: %d work units, %d images, %.1f images/s",
      process,
      units,
      images,
      images / max(seconds, 1e-3),
    )
  return job.summary(ledger, work_units) | {"damaged": len(ledger.damaged)}


def verify(config: Config, workdir: str) -> dict[str, int]:
  """Reads all inputs and outputs of a job, and checks hashes and counts.

  Args:
    config: from `defaults.capfilt`.
    workdir: folder of the job if `config.out` is empty.

  Returns:
    The numbers of work units and images.

  Raises:
    ValueError: a work unit is not done, its input has changed, its rows are
      damaged, its counts do not match its rows, or an image is in two work
      units; lists each problem, and says what to do.
  """
  ledger = Ledger(config.out or workdir)
  work_units = job.work_units_of(ledger)
  problems, key_counts = [], collections.Counter()
  to_delete = []  # done-files that the job itself would trust
  for work_unit in progress.bar(work_units, unit="work unit"):
    done = ledger.done(work_unit)
    found = ["not done, or its input or settings have changed since"]
    if work_unit.name in ledger.damaged:
      found = [ledger.damaged[work_unit.name]]
    elif done is not None:
      try:
        found = _problems(ledger, work_unit, done, key_counts)
      except (OSError, ValueError) as error:
        found = [command.message(error)]
      to_delete += [ledger.done_path(work_unit)] if found else []
    problems += [f"{work_unit.name}: {problem}" for problem in found]
  advice = [_how_to_redo(to_delete)] if problems else []
  repeated = [key for key, count in key_counts.items() if count > 1]
  if repeated:
    problems.append(
      f"{len(repeated)} images are in two work units: {repeated[:3]}"
    )
    advice.append(
      "Images in two work units: if these work units have no other problem, "
      "label config.source, with each image once, into another config.out."
    )
  if problems:
    lines = "\n".join(f"  {line}" for line in problems[:_MAX_LISTED])
    raise ValueError(
      f"{ledger.folder}: {len(problems)} problems:\n{lines}\n"
      + "\n".join(advice)
    )
  return {"work_units": len(work_units), "images": len(key_counts)}


def _how_to_redo(to_delete: Sequence[files.Path]) -> str:
  """What to do about work units with problems."""
  command = "the command that started the job (config.job=capfilt)"
  if not to_delete:
    return f"Run {command} again: it does these work units, and no other."
  paths = " ".join(shlex.quote(str(path)) for path in to_delete)
  return (
    "To do these work units again, delete the files that say that they are "
    f"done:\n  rm {paths}\nThen run {command} again: it does no other."
  )


def _problems(
  ledger: Ledger,
  work_unit: WorkUnit,
  done: Mapping[str, Any],
  key_counts: collections.Counter,
) -> list[str]:
  """The problems of a work unit that is done; counts the keys of its images."""
  problems = []
  # All of it is read, whatever its times are.
  if done["input"] != done["input"] | work_unit.fingerprint():
    problems.append("its input has changed since it was done")
  try:
    text_rows = rows.read(ledger.rows_path(work_unit), done["output"]["sha256"])
  except files.DamagedFile as error:
    return [*problems, str(error)]
  key_counts.update({row["key"] for row in text_rows} | done["bad"].keys())
  for kind, counts in (("images", done["images"]), *done["texts"].items()):
    if counts["in"] != counts["kept"] + counts["dropped"] + counts["bad"]:
      problems.append(f"{kind}: counts do not add up: {json.dumps(counts)}")
  for source, counts in done["texts"].items():
    num_rows = sum(row["source"] == source for row in text_rows)
    if num_rows != counts["in"]:
      problems.append(
        f"{source}: {counts['in']} texts were counted, but {num_rows} rows "
        "are there"
      )
  return problems
