"""Whether statements about pairs of images are true: predicted, and scored."""

import csv
import dataclasses
import io
import logging
from collections.abc import Iterator

import jax
import numpy as np

from blip_jax.data import statement_examples
from blip_jax.evaluators import base, result_file
from blip_jax.evaluators.scores import truth
from blip_jax.runtime import files, train_state
from blip_jax.tasks import base as tasks

log = logging.getLogger(__name__)


def build(context: base.Context) -> list[base.Evaluator]:
  """Returns the evaluator of the predictions."""
  settings, config = context.settings, context.config
  example = context.example
  assert isinstance(example, statement_examples.StatementExample)
  split = base.Split(
    example.open_source(settings.source, settings.image_root),
    dataclasses.replace(
      example, swap=config.nlvr.legacy_eval_swap, with_label=False
    ),
    config.evals.batch_size,
    context.mesh,
    context.bad_samples,
  )
  log.info("Split %s: %s statements", context.name, f"{len(split.source):,}")
  file = context.file(f"{context.name}_predictions.csv")
  return [Comparisons(split, context.task, file)]


class Comparisons:
  """Predicts whether each statement of a split is true of its two images.

  `accuracy` is the share of predictions that are right, `consistency` that of
  statements all of whose pairs are predicted right, both in percent, and `loss`
  the mean cross-entropy. Pairs that cannot be read, and rows that repeat an id,
  count nowhere; pairs without a label are predicted, and not scored.

  Args:
    split: statements.
    task: with the predict function `compare`.
    results: CSV file for the predictions, which NLVR2's program reads: the id
      of a row, and True or False.
  """

  def __init__(
    self, split: base.Split, task: tasks.Task, results: result_file.ResultFile
  ):
    self._split = split
    self._results = results
    self._program = jax.jit(task.predict_fns["compare"])

  def run(self, state: train_state.TrainState) -> Iterator[tuple[str, float]]:
    logits, valid = self._split.map(
      lambda batch: self._program(state.params, batch)
    )
    rows = self._split.distinct(valid, "statement_id")
    if jax.process_index() == 0:
      lines = [(id, bool(np.argmax(logits[n]))) for id, (n, _) in rows.items()]
      with self._results.writing() as path:
        files.write_text(path, _csv(lines))
    scored = [(r, logits[n]) for n, r in rows.values() if "label" in r]
    if scored:
      scores = truth.score(
        np.stack([x for _, x in scored]),
        np.array([record["label"] for record, _ in scored]),
        [record["group"] for record, _ in scored],
      )
      yield from scores._asdict().items()


def _csv(rows: list[tuple[str, bool]]) -> str:
  text = io.StringIO()
  csv.writer(text, lineterminator="\n").writerows(rows)
  return text.getvalue()
