"""What describes something, or is a key of a cache, cannot be changed."""

import dataclasses

import pytest

from blip_jax import build
from blip_jax.capfilt import label, rules, work_units
from blip_jax.convert import opening, pickles, registry, storages, weights
from blip_jax.data import (
  dialog_examples,
  examples,
  loader,
  randaugment,
  rejects,
  schema,
  statement_examples,
  transforms,
)
from blip_jax.data.scenes import drawing, stating
from blip_jax.evaluators import base
from blip_jax.evaluators.scores import caption_metrics
from blip_jax.inference import captioning, choosing, comparing, images, model
from blip_jax.models import card, config
from blip_jax.runtime import contact_sheet, start
from blip_jax.tasks import (
  align,
  caption,
  dialog,
  nlvr,
  pretrain,
  retrieval,
  vqa,
)


@pytest.mark.parametrize(
  "cls",
  [
    build.Run,
    label.Text,
    label.LabelledImage,
    label.Batch,
    rules.Rules,
    work_units.WorkUnit,
    opening.Checkpoint,
    pickles.Elements,
    pickles.Tensor,
    storages.Storage,
    registry.Released,
    weights.Leaf,
    dialog_examples.DialogExample,
    dialog_examples.DialogTexts,
    examples.PairExample,
    examples.ImageExample,
    examples.TextExample,
    loader._Prepare,
    randaugment.Op,
    randaugment.RandAugment,
    rejects.Bad,
    schema.Columns,
    statement_examples.StatementExample,
    transforms.TrainImage,
    transforms.EvalImage,
    drawing.Object,
    drawing.Scene,
    stating.Side,
    stating.Statement,
    base.Context,
    caption_metrics.Scores,
    captioning.Caption,
    choosing.Choice,
    choosing.Dialog,
    comparing.Comparison,
    images.ImageReader,
    model.Model,
    card.Card,
    config.SpecialTokens,
    config.ViTConfig,
    config.MedConfig,
    config.BlipConfig,
    start.Origin,
    contact_sheet.Cell,
    align.Align,
    caption.Caption,
    dialog.Dialog,
    nlvr.Nlvr,
    pretrain.Pretrain,
    retrieval.Retrieval,
    vqa.Vqa,
  ],
)
def test_a_value_cannot_be_changed(cls):
  value = object.__new__(cls)
  name = dataclasses.fields(cls)[0].name
  with pytest.raises(dataclasses.FrozenInstanceError):
    setattr(value, name, None)


def test_the_same_configs_are_equal_and_have_one_hash():
  """They are static arguments of compiled programs."""
  one, two = (
    config.variant(
      "tiny", image_size=16, vocab_size=9, tokens=config.SpecialTokens()
    )
    for _ in range(2)
  )
  assert one == two and hash(one) == hash(two)


def test_a_loaded_model_is_only_equal_to_itself():
  """Comparing its parameters would be ambiguous, and slow."""
  one, two = object.__new__(model.Model), object.__new__(model.Model)
  assert one == one and one != two
  assert len({one, two}) == 2
