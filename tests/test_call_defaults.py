"""What a call does unless it is told otherwise."""

import inspect

import pytest

from blip_jax.capfilt import label, pair_files, rules, work_units
from blip_jax.capfilt.engines import local
from blip_jax.convert import adapt, opening, weights
from blip_jax.data import (
  annotations,
  examples,
  inputs,
  json_datasets,
  loader,
  parquet,
  randaugment,
  rejects,
  shards,
  tables,
  tfds,
  token_file,
  transforms,
)
from blip_jax.evaluators import base as evaluators_base
from blip_jax.evaluators import ranking
from blip_jax.inference import (
  images,
  index,
  loading,
  matching,
  model,
  scoring,
  urls,
)
from blip_jax.models import blip, layers, med, nlvr, vit
from blip_jax.runtime import (
  alarms,
  checkpoint,
  contact_sheet,
  metrics,
  progress,
  resumable,
  resume,
  saved_arrays,
)
from blip_jax.tasks import (
  align,
  base,
  caption,
  losses,
  pretrain,
  retrieval,
  vqa,
)
from blip_jax.tasks import nlvr as nlvr_task

# Images one by one from disk, without a bar, a mistake in one is an error.
IMAGES = {
  "batch_size": None,
  "urls": False,
  "allow_private": False,
  "on_error": "raise",
  "progress": False,
}
VIDEOS = {**IMAGES, "num_frames": 0}
# Models are applied without dropout, and trained with it.
APPLIED = {"deterministic": True}
TRAINED = {"train": True}
CAPTIONED = {"image_root": "", "with_captions": True, "keep": ()}

DEFAULTS = [
  (model.Model.caption, {**VIDEOS, "seed": 0, "prompt": None}),
  (model.Model.caption_stream, {**VIDEOS, "seed": 0, "prompt": None}),
  (model.Model.answer, VIDEOS),
  (model.Model.answer_stream, VIDEOS),
  (model.Model.choose, IMAGES),
  (model.Model.choose_stream, IMAGES),
  (model.Model.compare, IMAGES),
  (model.Model.compare_stream, IMAGES),
  (
    model.Model.match,
    {**VIDEOS, "pairwise": False, "legacy_cls": False},
  ),
  (model.Model.embed_images, VIDEOS),
  (model.Model.embed_texts, {"batch_size": 64}),
  (
    model.Model.features,
    {"batch_size": None, "urls": False, "allow_private": False},
  ),
  (loading.load, {"task": None, "image_size": None, "drop": ()}),
  (
    images.ImageReader,
    {"urls": False, "num_frames": 0, "allow_private": False},
  ),
  (images.batches, {"on_error": "raise", "progress": False}),
  (urls.fetch, {"allow_private": False}),
  (index.build, {"num_threads": 8, "num_frames": 0}),
  (index.Index.nearest, {"factory": ""}),
  (
    matching.Matcher.match_candidates,
    {"legacy_cls": False, "batch_size": 8},
  ),
  (matching.Matcher.tokens, {"clean": True}),
  (scoring.Scorer.start_itm_logits, {"legacy_cls": False}),
  (scoring.image_bytes, {"num_frames": 1}),
  (scoring.block_size, {"num_frames": 1}),
  (blip.Blip.encode_image, APPLIED),
  (blip.Blip.encode_text, APPLIED),
  (blip.Blip.image_features, APPLIED),
  (blip.Blip.video_features, APPLIED),
  (blip.Blip.text_feat, APPLIED),
  (blip.Blip.fuse, {**APPLIED, "legacy_cls": False}),
  (blip.Blip.match, {**APPLIED, "legacy_cls": False}),
  (blip.Blip.decode, {**APPLIED, "encoder_mask": None}),
  (blip.Blip.init_cache, {"num_texts": 1}),
  (layers.Attention.__call__, APPLIED),
  (med.Med, {"with_lm_head": False}),
  (med.Med.__call__, {**APPLIED, "causal": False}),
  (med.Med.init_cache, {"num_texts": 1}),
  (med.PostNormAttention.__call__, APPLIED),
  (nlvr.TwoImageAttention.__call__, APPLIED),
  (nlvr.Nlvr.__call__, APPLIED),
  (vit.ViT.__call__, APPLIED),
  (base.Task.loss, TRAINED),
  (base.pair_example, {"prompt": "", "with_image_id": False}),
  (align.Align, {"groups": 1, "num_shards": 1}),
  (caption.Caption, {"label_smoothing": 0.1, "groups": 1}),
  (caption.Caption.loss, TRAINED),
  (
    pretrain.Pretrain,
    {"label_smoothing": 0.1, "loss_weights": (1.0, 1.0, 1.0), "groups": 1},
  ),
  (pretrain.Pretrain.loss, TRAINED),
  (retrieval.Retrieval, {"negative_groups": 1, "itc_targets": "idx"}),
  (retrieval.Retrieval.loss, TRAINED),
  (vqa.Vqa, {"label_smoothing": 0.1}),
  (vqa.Vqa.loss, TRAINED),
  (nlvr_task.Nlvr.loss, TRAINED),
  (losses.lm_loss, {"groups": 1}),
  (annotations.Annotations, CAPTIONED),
  (json_datasets.JsonDataset, CAPTIONED),
  (parquet.Parquet, CAPTIONED),
  (tables.Csv, {**CAPTIONED, "delimiter": None, "columns": None}),
  (tfds.Tfds, {"with_captions": True, "keep": ()}),
  (token_file.TokenFile, CAPTIONED),
  (shards.TarShards, {"with_captions": True, "keep": ()}),
  (
    examples.PairExample,
    {
      "max_words": 30,
      "max_length": 30,
      "max_pixels": 80_000_000,
      "prompt": "",
      "with_image_id": False,
    },
  ),
  (examples.ImageExample, {"max_pixels": 80_000_000, "num_frames": 0}),
  (inputs.train_loader, {"process_index": 0, "process_count": 1}),
  (inputs.bad_samples, {"process_index": 0}),
  (
    loader.train_loader,
    {
      "weights": (),
      "rotate": (),
      "num_workers": 0,
      "num_threads": 8,
      "process_index": 0,
      "process_count": 1,
    },
  ),
  (
    loader.eval_loader,
    {"num_threads": 8, "process_index": 0, "process_count": 1},
  ),
  # BLIP's: two of ten operations, each with probability 1/2, at 5 of 10.
  (randaugment.RandAugment, {"num_ops": 2, "magnitude": 5, "prob": 0.5}),
  (randaugment.Op, {"signed": False}),
  (transforms.TrainImage, {"ratio": (3 / 4, 4 / 3)}),
  (transforms.pre_question, {"max_words": 50}),
  (transforms.resized, {"scaled": False}),
  (rejects.BadSamples, {"path": None, "max_fraction": 0.05, "min_seen": 1000}),
  (evaluators_base.Split.image_example, {"num_frames": 0}),
  (ranking.Ranking, {"k_test": 0, "num_frames": 0}),
  (adapt.to_family, {"keep_momentum": True}),
  (opening.open_checkpoint, {"keep_momentum": True, "drop": ()}),
  (weights.from_external, {"drop": ()}),
  (
    label.Labeller,
    {
      "num_threads": 8,
      "num_workers": 0,
      "prompt": None,
      "scaled_jpeg": False,
    },
  ),
  (local.Leased, {"lease_seconds": 300.0}),
  (pair_files.open_writer, {"replace": False}),
  (work_units.WorkUnit, {"with_texts": True, "rows": None}),
  (
    rules.Rules,
    {
      "threshold": 0.5,
      "sources": ("web", "synthetic"),
      "min_words": 1,
      "max_words": 0,
      "max_repeats": 0,
      "markup": True,
      "near_duplicates": 1.0,
      "max_per_image": 0,
    },
  ),
  (alarms.CollapseAlarm, {"window": 400}),
  (checkpoint.Checkpoints, {"keep": 2, "keep_every_steps": 0}),
  (checkpoint.Checkpoints.save, {"force": False}),
  (contact_sheet.contact_sheet, {"title": "", "columns": 6}),
  (metrics.MetricWriter, {"start_step": 0}),
  (progress.Progress.update, {"logged": False}),
  (resumable.begin, {"force": False, "write": True}),
  (resume.check, {"refuse": True}),
  (saved_arrays.first_lines, {"limit": 20}),
]


@pytest.mark.parametrize(
  "call, expected",
  DEFAULTS,
  ids=[
    f"{c.__module__.removeprefix('blip_jax.')}.{c.__qualname__}"
    for c, _ in DEFAULTS
  ],
)
def test_defaults_of_a_call(call, expected):
  parameters = inspect.signature(call).parameters
  found = {name: parameters[name].default for name in expected}
  assert found == expected
  # 1 equals True.
  types = {name: type(value) for name, value in found.items()}
  assert types == {name: type(value) for name, value in expected.items()}
