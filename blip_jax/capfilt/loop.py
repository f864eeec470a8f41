"""The loop over work units that are handed out: each is opened, labelled, and
written."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax

import blip_jax
from blip_jax.capfilt import label, rows
from blip_jax.capfilt.engines.handout import Handout, tried
from blip_jax.capfilt.ledger import Ledger
from blip_jax.capfilt.progress import Opened, Progress
from blip_jax.capfilt.work_units import WorkUnit
from blip_jax.data import sources


def label_all(
  handout: Handout,
  labeller: label.Labeller,
  ledger: Ledger,
  threshold: float,
  constants: dict[str, Any],
  progress: Progress,
) -> None:
  """Labels all work units that are handed out, and writes their files.

  Args:
    handout: of work units of the job.
    labeller: the models.
    ledger: of the job, which has begun.
    threshold: the least `itm_prob` of a text that is kept.
    constants: columns that are equal in all rows: captioner, filter, seed.
    progress: shown meanwhile.

  Raises:
    ValueError: a work unit could not be done in several tries.
  """
  with contextlib.closing(handout.claims()) as claims:
    for first in claims:
      assert first is not None  # nothing is held here
      # Up to a None, where this process has to finish what it has.
      more = iter(lambda: next(claims, None), None)
      opened = _open_all(itertools.chain([first], more), handout, ledger)
      with contextlib.closing(labeller(opened)) as batches:
        for batch in batches:
          unit = batch.work_unit
          progress.show(unit)
          for image in batch.labelled:
            image_rows = [*rows.of_image(image, threshold, constants)]
            unit.counts.add(image, image_rows)
            unit.text_rows.extend(image_rows)
          progress.add(len(batch.labelled), unit.counts)
          handout.progress()
          if batch.is_last:
            with tried(handout, unit.work_unit):
              finish(unit, ledger, constants)
              handout.end(unit.work_unit)
              progress.end(unit.counts, labeller.readers.images_per_core)


def _open_all(
  claims: Iterable[tuple[WorkUnit, int]],
  handout: Handout,
  ledger: Ledger,
) -> Iterator[tuple[Opened, sources.Rows]]:
  """Opens what is claimed, except for what cannot be read."""
  for work_unit, num_done in claims:
    opened = None
    with tried(handout, work_unit):
      ledger.check_paths(work_unit)
      before = work_unit.input()
      source, damage = work_unit.open()
      counts = rows.Counts(damage)
      opened = Opened(work_unit, num_done, before, len(source), counts), source
    if opened is not None:
      yield opened


def finish(unit: Opened, ledger: Ledger, constants: dict[str, Any]) -> None:
  """Writes the files of a work unit whose images are all labelled.

  Raises:
    work_units.Unusable: its input is another one now than when it was opened,
      or cannot be read; nothing is written.
  """
  report = {
    "work_unit": unit.work_unit.name,
    "input": unit.before.as_json(),
    "version": blip_jax.__version__,
    "made_with": made_with(),
    **constants,
    **unit.counts.as_json(),
  }
  table = rows.to_parquet(unit.text_rows)
  unit.work_unit.check_unchanged(unit.before)
  ledger.finish(unit.work_unit, table, report)


def made_with() -> dict[str, str]:
  """What may change the last bits of scores, and is not refused."""
  return {"jax": jax.__version__, "platform": jax.default_backend()}
