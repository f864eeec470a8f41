"""How well it works: evaluators over held-out splits."""

import os

import jax
from ml_collections import ConfigDict

from blip_jax.data import datasets, inputs, tokenizer, transforms
from blip_jax.evaluators import base, losses, matching, retrieval, samples
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
  example = inputs.pretrain_example(
    config, text, transforms.EvalImage(config.model.image_size)
  )
  bad_samples = inputs.bad_samples(config, workdir, jax.process_index())
  sheets = []
  for name, c in config.evals.items():
    if not isinstance(c, ConfigDict) or not c.source:
      continue
    source = datasets.open_source(c.source, c.image_root)
    split = base.Split(
      source, example, config.evals.batch_size, mesh, bad_samples
    )
    ranking = retrieval.Retrieval(split, task)
    evaluators[name] = [
      losses.Losses(split, task),
      ranking,
      matching.Matching(split, task),
    ]
    if c.samples:
      sheets.append(name)
      path = os.path.join(workdir, "samples.png")
      evaluators[name].append(
        samples.Samples(split, task, ranking, c.samples, path)
      )
  if len(sheets) > 1:
    raise ValueError(
      f"config.evals: samples.png shows one split, but {sheets} ask for it; "
      f"set config.evals.{sheets[-1]}.samples=0"
    )
  return evaluators


def run(evaluators: Evaluators, state) -> dict[str, float]:
  """All metrics as `split/metric`."""
  return {
    f"{split}/{metric}": float(value)
    for split, of_split in evaluators.items()
    for evaluator in of_split
    for metric, value in evaluator.run(state)
  }
