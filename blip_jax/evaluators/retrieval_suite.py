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
  return _of_split(context, _split(context))


def build_with_losses(context: base.Context) -> list[base.Evaluator]:
  """Returns the same evaluators after that of the held-out loss."""
  split = _split(context)
  losses = held_out_loss.HeldOutLoss(split, context.task)
  return [losses, *_of_split(context, split)]


def _split(context: base.Context) -> base.Split:
  settings = context.settings
  return context.split(
    datasets.open_source(settings.source, settings.image_root)
  )


def _of_split(context: base.Context, split: base.Split) -> list[base.Evaluator]:
  settings = context.settings
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
