"""The results of a job as one page to look at (`report.html`), with a table of
the texts (`report.csv`), and as JSON.
"""

import logging
import pathlib
from collections.abc import Sequence

from blip_jax.capfilt import (
  findings,
  html,
  job,
  merge,
  rows,
  rules,
  text_table,
)
from blip_jax.capfilt.ledger import NUMBER, Ledger, refuse_folders
from blip_jax.capfilt.work_units import WorkUnit
from blip_jax.runtime import files, json_files, lock, progress
from blip_jax.runtime.config import Config

log = logging.getLogger(__name__)

# What counts of a line of `log`, as `json_files` writes types.
_LOG_LINE = {"images": NUMBER, "seconds": float}


def report(config: Config, workdir: str) -> dict[str, int]:
  """Writes `report.html`, .csv and .json into the folder of a job.

  The page contains its thumbnails and loads nothing. All show what
  `config.merge` would keep of the work units that are done so far.

  Args:
    config: from `defaults.capfilt`.
    workdir: folder of the job if `config.out` is empty.

  Returns:
    `<source>/<outcome>`: the number of web and synthetic texts that are kept,
    or dropped for each reason; and how many work units are `damaged` and left
    out, if any. The log and `report.json` name their files.

  Raises:
    ValueError: no work unit is done, another process writes a report, or a
      folder is in the place of one.
  """
  ledger = Ledger(config.out or workdir)
  work_units = job.work_units_of(ledger)
  names = "report.html", "report.json", html.TABLE
  refuse_folders(*(ledger.folder / name for name in names))
  with lock.hold(lock.path_for(ledger.folder / "report.html")):
    return _report(config, ledger, work_units)


def _report(
  config: Config, ledger: Ledger, work_units: Sequence[WorkUnit]
) -> dict[str, int]:
  done = ledger.all_done(work_units)
  done_files = {u: done[u.name] for u in work_units if u.name in done}
  if not done_files:
    raise ValueError(
      f"{ledger.folder}: no work unit is done, so there is nothing to show; "
      "start the job with config.job=capfilt"
    )
  active_rules = merge.rules_of(config)
  selection = rules.Selection(active_rules)
  found = findings.Findings(active_rules.threshold)
  with text_table.open_table(ledger.folder / html.TABLE) as add_to_table:
    for number, (work_unit, done) in enumerate(
      progress.bar(done_files.items(), unit="work unit")
    ):
      try:
        text_rows = rows.read(
          ledger.rows_path(work_unit), done["output"]["sha256"]
        )
      except files.DamagedFile as error:
        ledger.note_damage(work_unit, error)
        continue
      reasons = selection.reasons(text_rows)
      found.add(number, text_rows, reasons, done)
      add_to_table(text_rows, reasons)
  content = found.as_json() | {
    "job": ledger.settings,
    "rules": vars(active_rules),
    "throughput": _throughput(ledger.folder / "log"),
  }
  if ledger.damaged:
    content["damaged"] = ledger.damaged
  work_units = [*done_files]
  galleries = {
    title: [html.card(item, work_units) for item in gallery]
    for title, gallery in found.galleries().items()
  }
  files.write_json(ledger.folder / "report.json", content)
  path = ledger.folder / "report.html"
  files.write_text(path, html.render(content, galleries))
  log.info("%s shows what is kept and why", path)
  counts = {
    f"{source}/{outcome}": number
    for source, outcomes in content["texts"].items()
    for outcome, number in outcomes.items()
  }
  return counts | ({"damaged": len(ledger.damaged)} if ledger.damaged else {})


def _throughput(
  log_folder: pathlib.PurePath,
) -> dict[str, dict[str, float | int]]:
  """Process -> the number of its images, its seconds, and their ratio."""
  throughput = {}
  try:
    names = files.list_folder(log_folder)
  except OSError as error:
    log.warning("%s: left out: %s", log_folder, error.strerror)
    return {}
  for name in names:
    if not name.endswith(".jsonl"):
      continue
    # A running process may be writing its last line.
    num_images, seconds = 0, 0.0
    try:
      for line in files.json_lines(log_folder / name):
        # Of a line that is damaged, nothing counts.
        if not json_files.problem(line, _LOG_LINE, complete=True):
          num_images += line["images"]
          seconds += line["seconds"]
    except OSError as error:
      path = files.printable(str(log_folder / name))
      log.warning("%s: left out: %s", path, error.strerror)
    throughput[name.removesuffix(".jsonl")] = {
      "images": num_images,
      "seconds": round(seconds, 1),
      "images_per_second": round(num_images / max(seconds, 1e-3), 2),
    }
  return throughput
