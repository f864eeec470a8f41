"""What a job found, as one page to look at (`report.html`) and as JSON."""

import json
import logging
import pathlib

import tqdm
from ml_collections import ConfigDict

from blip_jax.capfilt import (
  findings,
  html,
  job,
  ledger,
  merge,
  rows,
  rules,
)
from blip_jax.runtime import (
  files,
)

log = logging.getLogger(__name__)


def report(config: ConfigDict, workdir: str) -> dict[str, int]:
  """Writes `report.html` and `report.json` into the job's folder.

  The page has everything in it, thumbnails too, and loads nothing. What is kept
  is what `config.merge` would keep of the units that are done.

  Raises:
    ValueError: no unit is done.
  """
  book = ledger.Ledger(config.out or workdir)
  todo = [u for u in job.units_of(book.settings) if book.done(u) is not None]
  if not todo:
    raise ValueError(
      f"{book.folder}: no unit is done, so there is nothing to "
      "show; start the job with config.job=capfilt"
    )
  selection = rules.Selection(rule := merge.rules_of(config))
  found = findings.Findings(rule.threshold)
  for number, unit in enumerate(tqdm.tqdm(todo, unit="unit")):
    own = rows.read(book.rows_path(unit))
    found.add(number, own, selection.reasons(own), book.done(unit))
  told = found.as_json() | {
    "job": book.settings,
    "rules": vars(rule),
    "throughput": _throughput(book.folder),
  }
  galleries = {
    title: [html.card(shown, todo) for shown in gallery]
    for title, gallery in found.galleries().items()
  }
  files.write_json(book.folder / "report.json", told)
  path = book.folder / "report.html"
  files.write_text(path, html.render(told, galleries))
  log.info("%s shows what was kept and why", path)
  return {
    f"{source}/{fate}": number
    for source, fates in told["texts"].items()
    for fate, number in fates.items()
  }


def _throughput(folder: pathlib.Path) -> dict[str, dict[str, float | int]]:
  """Of each process that took part: pictures, seconds, and their ratio."""
  found = {}
  for path in sorted((folder / "log").glob("*.jsonl")):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    number = sum(line["pictures"] for line in lines)
    seconds = sum(line["seconds"] for line in lines)
    found[path.stem] = {
      "pictures": number,
      "seconds": round(seconds, 1),
      "pictures_per_second": round(number / max(seconds, 1e-3), 2),
    }
  return found
