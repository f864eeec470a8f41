"""From the rows of a job to a training set; cheap, to be done again at will."""

import collections
import contextlib
import functools
import itertools
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tqdm
from ml_collections import ConfigDict

from blip_jax.capfilt import (
  job,
  ledger,
  pair_files,
  rows,
  rules,
)
from blip_jax.data import datasets, sources, transforms
from blip_jax.runtime import (
  files,
)

log = logging.getLogger(__name__)

HUMAN = "human"

_Stats = dict[str, collections.Counter]
# A row with its text, and where its picture is had.
_Pair = tuple[dict[str, Any], Callable[[], pair_files.Image]]


def merge(config: ConfigDict, workdir: str) -> dict[str, int]:
  """Writes the texts that `config.merge` keeps, with their pictures, as what
  `config.data.train` reads.

  `config.merge.out` is a .json or .jsonl of {image, caption, image_id?, source,
  ...}, where pictures are files of their own, or a folder of webdataset shards.
  With `by_source` there is one for the texts of the web, one for synthetic ones
  and one for those of people, so that training can weigh them. Beside it a
  .stats.json says how many were kept, and why others were not.

  Args:
    config: from `config.capfilt`.
    workdir: where the job is if the config does not say.

  Raises:
    ValueError: units are not done, an option cannot be, or nothing is kept.
  """
  own = config.merge
  selection = rules.Selection(rules_of(config))
  folder = config.out or workdir
  out = pathlib.Path(own.out or os.path.join(folder, "clean.json"))
  done = [unit for path in (folder, *own.jobs) for unit in _done(path)]
  stats = collections.defaultdict(collections.Counter)
  with contextlib.ExitStack() as stack:

    @functools.cache
    def writer(kind: str) -> pair_files.Writer:
      path = pair_files.of_source(out, kind) if own.by_source else out
      return stack.enter_context(pair_files.open_writer(path))

    of_unit = lambda unit: _kept(*unit, selection, stats)
    kept = itertools.chain.from_iterable(map(of_unit, tqdm.tqdm(done)))
    human = _human(own.human, config.image_root, stats)
    for row, image in itertools.chain(kept, human):
      of_source = stats[row["source"]]
      try:
        writer(row["source"] if own.by_source else "").add(row, image)
      except transforms.BadSample as bad:  # gone since, or never looked at
        of_source[bad.reason] += 1
      else:
        of_source["kept"] += 1
    kept = sum(counts["kept"] for counts in stats.values())
    if not kept:
      raise ValueError(
        f"config.merge: no text is kept; found {_flat(stats)}. Lower "
        "config.merge.threshold, and look at the report"
      )
  files.write_json(out.with_name(f"{out.name}.stats.json"), _flat(stats))
  log.info("%d pairs are in %s", kept, out)
  return _flat(stats)


def rules_of(config: ConfigDict) -> rules.Rules:
  """The rules that `config.merge` has."""
  names = rules.Rules.__dataclass_fields__
  given = {name: config.merge[name] for name in names}
  return rules.Rules(**given | {"sources": tuple(config.merge.sources)})


def _done(folder: str) -> Iterator[tuple[ledger.Ledger, Any]]:
  book = ledger.Ledger(folder)
  todo = job.units_of(book.settings)
  missing = [unit.name for unit in todo if book.done(unit) is None]
  if missing:
    raise ValueError(
      f"{folder}: {len(missing)} of {len(todo)} units are not done, the first: "
      f"{missing[:3]}; let the job finish (config.job=capfilt)"
    )
  yield from ((book, unit) for unit in todo)


def _kept(
  book: ledger.Ledger, unit: Any, selection: rules.Selection, stats: _Stats
) -> Iterator[_Pair]:
  """What is kept of a unit."""
  source, _ = unit.open()
  found = rows.read(book.rows_path(unit))
  for row, reason in zip(found, selection.reasons(found), strict=True):
    stats[row["source"]]["in"] += 1
    if reason:
      stats[row["source"]][reason] += 1
    else:
      path = _below(row["image"], unit.image_root)
      image = functools.partial(_image, source, row["row"])
      yield row | {"image": path}, image


def _human(
  specs: Iterable[str], image_root: str, stats: _Stats
) -> Iterator[_Pair]:
  """Pairs with captions of people, which nothing filters."""
  for spec in filter(None, specs):
    source = datasets.open_source(spec, image_root)
    for place in range(len(source)):
      try:
        record = source[place]
      except sources.BadRow as bad:
        stats[HUMAN].update(["in", bad.reason])
        continue
      row = {
        "key": record["id"],
        "image": _below(sources.image_path(record) or None, image_root),
        "image_id": record.get("image_id"),
        "source": HUMAN,
      }
      for text in sources.captions(record):
        stats[HUMAN]["in"] += 1
        try:
          text = transforms.clean_text(text)
        except transforms.BadSample as bad:
          stats[HUMAN][bad.reason] += 1
          continue
        yield row | {"text": text}, functools.partial(_image, source, place)


def _image(source: Any, place: int) -> pair_files.Image:
  return source[place]["image"]


def _below(path: str | None, root: str) -> str | None:
  """A path as the annotation had it, so that the same root leads there."""
  return path and path.removeprefix(os.path.join(root, "") if root else "")


def _flat(stats: _Stats) -> dict[str, int]:
  return {
    f"{kind}/{fate}": number
    for kind, counts in sorted(stats.items())
    for fate, number in sorted(counts.items())
  }
