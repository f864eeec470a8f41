"""How far a job is (`status`), and whether all of it is whole (`verify`)."""

import collections
import hashlib
import json
import logging

import tqdm
from ml_collections import ConfigDict

from blip_jax.capfilt import (
  job,
  ledger,
  rows,
  work_units,
)

log = logging.getLogger(__name__)


def status(config: ConfigDict, workdir: str) -> dict[str, int]:
  """Says how many units are done, who works on which, and what was found."""
  book = ledger.Ledger(config.out or workdir, config.lease_seconds)
  todo = job.units_of(book.settings)
  for name, owner in book.leased().items():
    log.info(
      "%s: with process %d on %s, which said so %.0f s ago%s",
      name,
      owner["pid"],
      owner["host"],
      owner["seconds"],
      "; it may be taken over"
      if owner["seconds"] > config.lease_seconds
      else "",
    )
  return job.summary(book, todo)


def verify(config: ConfigDict, workdir: str) -> dict[str, int]:
  """Reads all that is done, and what it was made from.

  Raises:
    ValueError: a file is damaged, was made by other settings or from another
      input, or says of a text what another says; lists each.
  """
  book = ledger.Ledger(config.out or workdir)
  todo = job.units_of(book.settings)
  problems, seen = [], collections.Counter()
  for unit in tqdm.tqdm(todo, unit="unit"):
    problems += [f"{unit.name}: {what}" for what in _problems(book, unit, seen)]
  twice = [key for key, number in seen.items() if number > 1]
  if twice:
    problems.append(f"{len(twice)} pictures are in two units: {twice[:3]}")
  if problems:
    lines = "\n".join(f"  {line}" for line in problems[:50])
    raise ValueError(
      f"{book.folder}: {len(problems)} problems:\n{lines}\nWhat is not done or "
      "is damaged is done again by config.job=capfilt, once its .done.json is "
      "deleted"
    )
  return {"units": len(todo), "pictures": len(seen)}


def _problems(
  book: ledger.Ledger, unit: work_units.WorkUnit, seen: collections.Counter
) -> list[str]:
  told = book.done(unit)
  if told is None:
    return ["not done, or the input or the settings are others now"]
  problems = []
  if told["input"] != unit.fingerprint():
    problems.append("the input is another one now")
  content = book.rows_path(unit).read_bytes()
  if hashlib.sha256(content).hexdigest() != told["output"]["sha256"]:
    return [*problems, "its rows are not those that were written"]
  found = rows.read(book.rows_path(unit))
  seen.update({row["key"] for row in found} | told["bad"].keys())
  for what, counts in (("pictures", told["pictures"]), *told["texts"].items()):
    if counts["in"] != counts["kept"] + counts["dropped"] + counts["bad"]:
      problems.append(f"{what}: counts do not add up: {json.dumps(counts)}")
  for source, counts in told["texts"].items():
    number = sum(row["source"] == source for row in found)
    if number != counts["in"]:
      problems.append(
        f"{source}: {counts['in']} texts were counted, {number} are there"
      )
  return problems
