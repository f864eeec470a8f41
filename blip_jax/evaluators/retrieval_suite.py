"""The evaluators of retrieval and pre-training: ranking, ITM, samples."""

from blip_jax.data import datasets
from blip_jax.evaluators import (
  base,
  held_out_loss,
  itm_accuracy,
  ranking,
  samples,
)


def build(context: base.Context) -> list[base.Evaluator]:
  """Returns evaluators of recall, ITM accuracy and, if set, samples."""
  settings = context.settings
  split = context.split(
    datasets.open_source(settings.source, settings.image_root)
  )
  ranker = ranking.Ranking(
    split, context.task, settings.k_test, settings.num_frames
  )
  if settings.num_frames:
    return [ranker]
  evaluators = [ranker, itm_accuracy.ItmAccuracy(split, context.task)]
  if settings.samples:
    sheet = context.file("samples.png")
    evaluators.append(
      samples.Samples(split, context.task, ranker, settings.samples, sheet)
    )
  return evaluators


def build_with_losses(context: base.Context) -> list[base.Evaluator]:
  """Returns the same evaluators after that of the held-out loss."""
  settings = context.settings
  split = context.split(
    datasets.open_source(settings.source, settings.image_root)
  )
  return [held_out_loss.HeldOutLoss(split, context.task), *build(context)]
