"""Candidate answers in the dialogs of a split: ranked, saved and scored."""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from blip_jax.data import dialog_examples, dialogs
from blip_jax.evaluators import base, result_file
from blip_jax.evaluators.scores import ranks
from blip_jax.runtime import files, train_state
from blip_jax.tasks import base as tasks

log = logging.getLogger(__name__)


def build(context: base.Context) -> list[base.Evaluator]:
  """Returns the evaluator of the rankings."""
  settings, config = context.settings, context.config
  example = context.example
  assert isinstance(example, dialog_examples.DialogExample)
  source = example.open_source(settings.source, settings.image_root)
  rounds, candidates = dialog_examples.most(
    source, config.dialog.max_rounds, config.dialog.max_candidates
  )
  split = base.Split(
    source,
    dataclasses.replace(
      example, rounds=rounds, candidates=candidates, sampled=False
    ),
    config.evals.batch_size,
    context.mesh,
    context.bad_samples,
  )
  log.info(
    "Split %s: %s dialogs of up to %d rounds with up to %d candidates",
    *(context.name, f"{len(source):,}", rounds, candidates),
  )
  return [
    Choices(split, context.task, context.file(f"{context.name}_ranks.json"))
  ]


class Choices:
  """Ranks the candidates of all rounds of a split's dialogs.

  `mrr`, `r1`, `r5` and `r10`, in percent, and `mean_rank` are those of the
  right candidates; `ndcg`, in percent, is of rounds whose candidates have
  relevance. Dialogs that cannot be read, and rows that repeat an id, count
  nowhere; rounds whose right candidate is secret are ranked, and not scored.

  Args:
    split: dialogs.
    task: with the predict function `score`.
    results: JSON file for the ranks, which VisDial's server reads.
  """

  def __init__(
    self, split: base.Split, task: tasks.Task, results: result_file.ResultFile
  ):
    self._split = split
    self._results = results
    self._program = jax.jit(task.predict_fns["score"])

  def run(self, state: train_state.TrainState) -> Iterator[tuple[str, float]]:
    scores, valid = self._split.map(
      lambda batch: self._program(state.params, batch)
    )
    rows = self._split.distinct(valid, "dialog_id")
    scored = {
      id: _rounds(record["dialog"], scores[row])
      for id, (row, record) in rows.items()
    }
    if jax.process_index() == 0:
      with self._results.writing() as path:
        files.write_json(path, _formatted(scored))
    yield from _metrics([x for each in scored.values() for x in each])


@dataclasses.dataclass(frozen=True)
class _Scored:
  """A round of a dialog, and the scores of its candidates.

  Attributes:
    number: of the round, from 1 on.
    round: itself.
    scores: of the candidates.
  """

  number: int
  round: dialogs.Round
  scores: Float[np.ndarray, "_"]


def _rounds(
  dialog: tuple[dialogs.Round, ...], scores: Float[np.ndarray, "R C"]
) -> list[_Scored]:
  """The rounds that have candidates, whose scores are without the others."""
  return [
    _Scored(n + 1, dialog[n], row[: len(dialog[n].candidates)])
    for n, row in zip(dialog_examples.asked(dialog), scores, strict=False)
  ]


def _formatted(scored: dict[Any, list[_Scored]]) -> list[dict[str, Any]]:
  return [
    {
      "image_id": id,
      "round_id": each.number,
      "ranks": ranks.ranks(each.scores),
    }
    for id, rounds in scored.items()
    for each in rounds
  ]


def _metrics(rounds: list[_Scored]) -> Iterator[tuple[str, float]]:
  places = [
    ranks.right(each.scores, each.round.right)
    for each in rounds
    if each.round.right is not None
  ]
  if places:
    means = ranks.Right(*np.mean(places, axis=0).tolist())
    for name, value in means._asdict().items():
      yield name, value if name == "mean_rank" else 100 * value
  annotated = [each for each in rounds if each.round.relevance]
  gains = [ranks.ndcg(each.scores, each.round.relevance) for each in annotated]
  known = [gain for gain in gains if gain is not None]
  if len(known) < len(gains):
    log.warning(
      "%d of %d rounds have no relevant candidate, and are not in the NDCG",
      len(gains) - len(known),
      len(gains),
    )
  if known:
    yield "ndcg", 100 * float(np.mean(known))
