"""From the rows of a job to a training set, without running a model."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from blip_jax.capfilt import job, pair_files, rows, rules
from blip_jax.capfilt.ledger import Ledger, refuse_folders
from blip_jax.capfilt.work_units import WorkUnit
from blip_jax.data import datasets, sources, transforms
from blip_jax.runtime import files, lock, progress
from blip_jax.runtime.config import Config

log = logging.getLogger(__name__)

HUMAN = "human"

# Source of texts -> number by outcome: "in", "kept", or the reason to drop it.
_Stats = dict[str, collections.Counter]
# A row, and a function that returns its image.
_Pair = tuple[dict[str, Any], Callable[[], pair_files.Image]]


def merge(config: Config, workdir: str) -> dict[str, int]:
  """Writes the texts that `config.merge` keeps, with their images, as sources
  that `config.data.train` reads.

  `config.merge.out` is a .json or .jsonl of {image, caption, image_id?, source,
  ...}, for images that are files of their own, or a folder of webdataset
  shards. Paths of images start from `config.image_root`, by default that of the
  jobs. With `by_source`, web, synthetic and human texts get an output each,
  so that training can weight them. A .stats.json next to it says how many texts
  were kept, and why others were dropped. Where that is, the output is that of
  an earlier merge and is replaced; anything else stays.

  Args:
    config: from `defaults.capfilt`.
    workdir: folder of the job if `config.out` is empty.

  Returns:
    `<source>/<outcome>`: the content of .stats.json.

  Raises:
    ValueError: a work unit is not done, an option is invalid, no text is kept,
      another process writes the output, or it exists and is not that of an
      earlier merge.
  """
  folder = config.out or workdir
  out = files.as_path(config.merge.out or os.path.join(folder, "clean.json"))
  with lock.hold(lock.path_for(out)) as held:
    return _merge(config, folder, out, held)


def _merge(
  config: Config, folder: str, out: pathlib.PurePath, held: lock.Lock
) -> dict[str, int]:
  selection = rules.Selection(rules_of(config))
  done = []
  for path in (folder, *config.merge.jobs):
    ledger = Ledger(path)
    work_units = job.work_units_of(ledger)
    check_done(ledger, work_units)
    done += [(ledger, work_unit) for work_unit in work_units]
  image_root = _image_root(config, [work_unit for _, work_unit in done])
  stats: _Stats = collections.defaultdict(collections.Counter)
  stats_path = out.with_name(f"{out.name}.stats.json")
  refuse_folders(stats_path)
  replace = files.exists(stats_path)
  with contextlib.ExitStack() as stack:

    @functools.cache
    def writer(source: str) -> pair_files.Writer:
      path = out
      if config.merge.by_source:
        path = pair_files.for_kind(out, source)
      return stack.enter_context(pair_files.open_writer(path, replace))

    labelled = itertools.chain.from_iterable(
      _kept_pairs(ledger, work_unit, selection, image_root, stats)
      for ledger, work_unit in progress.bar(done, unit="work unit")
    )
    human = _human_pairs(config.merge.human, image_root, stats)
    for row, read_image in itertools.chain(labelled, human):
      counts = stats[row["source"]]
      try:
        writer(row["source"] if config.merge.by_source else "").add(
          row, read_image
        )
      # An image that is gone, or a human one that no job has read.
      except transforms.BadSample as bad:
        counts[bad.reason] += 1
      else:
        counts["kept"] += 1
    num_kept = sum(counts["kept"] for counts in stats.values())
    if not num_kept:
      raise ValueError(_nothing_kept(stats))
    held.check()  # The files get their names next.
  files.write_json(stats_path, _flat(stats))
  log.info(
    "%d pairs are in %s; read them with image_root=%r",
    num_kept,
    out,
    image_root,
  )
  return _flat(stats)


def _image_root(config: Config, work_units: Iterable[WorkUnit]) -> str:
  """The folder that image paths of the output start from.

  It is that of the jobs if they share one, so that it need not be given again.
  Paths of jobs with different roots start from the working directory.
  """
  if config.image_root:
    return config.image_root
  roots = {work_unit.image_root for work_unit in work_units}
  return roots.pop() if len(roots) == 1 else ""


def _nothing_kept(stats: _Stats) -> str:
  """Why a merge has no output."""
  if not stats:
    return (
      "config.merge: the jobs have no texts, so there is nothing to merge. "
      'Their .done.json say why images could not be used (under "bad"); '
      "without web texts there must be a config.captioner"
    )
  return (
    f"config.merge: no text is kept; counts are {_flat(stats)}. Lower "
    "config.merge.threshold, and look at the report (config.job=report)"
  )


def rules_of(config: Config) -> rules.Rules:
  """The rules of `config.merge`."""
  names = [field.name for field in dataclasses.fields(rules.Rules)]
  values = {name: config.merge[name] for name in names}
  values["sources"] = tuple(config.merge.sources)
  return rules.Rules(**values)


def check_done(
  ledger: Ledger, work_units: Sequence[WorkUnit]
) -> list[dict[str, Any]]:
  """The done-files of work units; raises `ValueError` unless all are there."""
  done = ledger.all_done(work_units)
  missing = [unit.name for unit in work_units if unit.name not in done]
  if missing:
    raise ValueError(
      f"{ledger.folder}: {len(missing)} of {len(work_units)} work units are "
      "not done, or their input, settings or rows have changed since, such as "
      f"{missing[:3]}; first finish the job with config.job=capfilt"
      + "".join(f"\n  {damage}" for damage in ledger.damaged.values())
    )
  return [done[unit.name] for unit in work_units]


def _kept_pairs(
  ledger: Ledger,
  work_unit: WorkUnit,
  selection: rules.Selection,
  image_root: str,
  stats: _Stats,
) -> Iterator[_Pair]:
  """The pairs of a work unit that the rules keep; counts all of them."""
  (done,) = check_done(ledger, [work_unit])
  source, _ = work_unit.open()
  text_rows = rows.read(ledger.rows_path(work_unit), done["output"]["sha256"])
  reasons = selection.reasons(text_rows)
  for row, reason in zip(text_rows, reasons, strict=True):
    stats[row["source"]]["in"] += 1
    if reason:
      stats[row["source"]][reason] += 1
    else:
      path = row["image"] and files.named(row["image"])
      path = _relative(path, image_root)
      read_image = functools.partial(_image, source, row["row"], row["key"])
      yield row | {"image": path}, read_image
  check_done(ledger, [work_unit])  # The images that were read are its own.


def _human_pairs(
  specs: Iterable[str], image_root: str, stats: _Stats
) -> Iterator[_Pair]:
  """The pairs of sources with human captions, which are not filtered."""
  for spec in filter(None, specs):
    source = datasets.open_source(spec, image_root)
    for index in range(len(source)):
      try:
        record = source[index]
      except sources.BadRow as bad:
        stats[HUMAN].update(["in", bad.reason])
        continue
      row = {
        "key": record["id"],
        "image": _relative(sources.image_path(record) or None, image_root),
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
        read_image = functools.partial(_image, source, index, row["key"])
        yield row | {"text": text}, read_image


def _image(source: Any, index: int, key: str) -> pair_files.Image:
  """The image of a row; raises `BadSample` if it is not that of the text."""
  record = source[index]
  if record["id"] != key:  # files of a folder were added, renamed or deleted
    detail = f"row {index}: expected {key}, found {record['id']}"
    raise transforms.BadSample("changed", detail)
  return record["image"]


def _relative(path: str | None, root: str) -> str | None:
  """The path by which training with this image root finds an image.

  Outside the root it is absolute: any other name could be that of another
  image below the root.
  """
  if not path or not root:
    return path
  inside = os.path.join(root, "")
  if path.startswith(inside):  # as annotations have it
    return path.removeprefix(inside)
  path = files.absolute(path)
  return path.removeprefix(os.path.join(files.absolute(root), ""))


def _flat(stats: _Stats) -> dict[str, int]:
  return {
    f"{source}/{outcome}": number
    for source, counts in sorted(stats.items())
    for outcome, number in sorted(counts.items())
  }
