"""What measures retrieval and pre-training: ranking, matching, samples."""

from blip_jax.data import datasets
from blip_jax.evaluators import (
  base,
  held_out_loss,
  itm_accuracy,
  ranking,
  samples,
)


def build(of: base.Context) -> list[base.Evaluator]:
  """Recall and ITM accuracy, and a contact sheet if samples are asked for."""
  settings = of.settings
  split = of.split(datasets.open_source(settings.source, settings.image_root))
  ranker = ranking.Ranking(split, of.task, settings.k_test, settings.num_frames)
  if settings.num_frames:
    return [ranker]
  evaluators = [ranker, itm_accuracy.ItmAccuracy(split, of.task)]
  if settings.samples:
    sheet = of.file("samples.png")
    evaluators.append(
      samples.Samples(split, of.task, ranker, settings.samples, sheet)
    )
  return evaluators


def build_with_losses(of: base.Context) -> list[base.Evaluator]:
  """The same, behind the losses on held-out rows."""
  settings = of.settings
  split = of.split(datasets.open_source(settings.source, settings.image_root))
  return [held_out_loss.HeldOutLoss(split, of.task), *build(of)]
