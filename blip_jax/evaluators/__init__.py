"""How well it works: evaluators over held-out splits."""

import os

import jax
from ml_collections import ConfigDict

from blip_jax import config as config_lib
from blip_jax.data import datasets, inputs, tokenizer, transforms
from blip_jax.evaluators import (
  base,
  captions,
  losses,
  matching,
  retrieval,
  samples,
)
from blip_jax.evaluators.scores import caption_files
from blip_jax.models import decoding
from blip_jax.tasks import base as tasks

Evaluators = dict[str, list[base.Evaluator]]


def build(
  config: ConfigDict,
  task: tasks.Task,
  text: tokenizer.Tokenizer,
  mesh: jax.sharding.Mesh,
  workdir: str,
) -> Evaluators:
  """The evaluators of each split in `config.evals`, by the split's name."""
  evaluators = {}
  example = inputs.pair_example(
    config, text, transforms.EvalImage(config.model.image_size)
  )
  bad_samples = inputs.bad_samples(config, workdir, jax.process_index())
  build_split = {
    "pretrain": _pretrain,
    "caption": _caption,
    "retrieval": _retrieval,
  }[config.task]
  sheets = []
  for name, c in config_lib.splits(config).items():
    if c.samples:
      sheets.append(name)
    open_split = lambda source, example=example: base.Split(
      source, example, config.evals.batch_size, mesh, bad_samples
    )
    evaluators[name] = build_split(name, c, config, task, open_split, workdir)
  if len(sheets) > 1:
    raise ValueError(
      f"config.evals: samples.png shows one split, but {sheets} ask for it; "
      f"set config.evals.{sheets[-1]}.samples=0"
    )
  return evaluators


def _pretrain(name, c, config, task, open_split, workdir):
  split = open_split(datasets.open_source(c.source, c.image_root))
  return [losses.Losses(split, task), *_ranking(c, task, split, workdir)]


def _retrieval(name, c, config, task, open_split, workdir):
  split = open_split(datasets.open_source(c.source, c.image_root))
  return _ranking(c, task, split, workdir)


def _ranking(c, task, split, workdir):
  ranking = retrieval.Retrieval(split, task, c.k_test, c.num_frames)
  if c.num_frames:
    return [ranking]
  evaluators = [ranking, matching.Matching(split, task)]
  if c.samples:
    path = os.path.join(workdir, "samples.png")
    evaluators.append(samples.Samples(split, task, ranking, c.samples, path))
  return evaluators


def _caption(name, c, config, task, open_split, workdir):
  # NoCaps has pictures whose captions only its server knows.
  described = c.references != "none"
  open_rows = datasets.open_source if described else datasets.open_pictures
  split = open_split(open_rows(c.source, c.image_root))
  references = None
  if described and c.references:
    references = caption_files.read_references(c.references)
  prompt = split.example.tokenizer.prompt_ids(split.example.prompt)
  settings = decoding.make(
    config.generation.to_dict(),
    len(prompt),
    task.model.config.med.max_positions,
  )
  written = captions.Captions(
    split,
    task,
    settings,
    references,
    os.path.join(workdir, f"{name}_captions.json"),
    os.path.join(workdir, "samples.png"),
    c.samples,
  )
  return [losses.Losses(split, task), written] if described else [written]


def run(evaluators: Evaluators, state) -> dict[str, float]:
  """All metrics as `split/metric`."""
  return {
    f"{split}/{metric}": float(value)
    for split, of_split in evaluators.items()
    for evaluator in of_split
    for metric, value in evaluator.run(state)
  }
