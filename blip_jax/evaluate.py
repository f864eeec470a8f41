"""Evaluation alone: the parameters of a run on the splits of a config."""

import logging
import os

import jax
import optax
from ml_collections import ConfigDict

from blip_jax import config as config_lib
from blip_jax import evaluators as evaluators_lib
from blip_jax import train
from blip_jax.data import inputs
from blip_jax.runtime import (
  checkpoint,
  sharding,
  snapshot,
  train_state,
  writers,
)

log = logging.getLogger(__name__)


def evaluate(config: ConfigDict, workdir: str) -> dict[str, float]:
  """Runs `config.evals` on the last checkpoint of the workdir.

  Writes `results.json` there and returns its content.
  """
  config_lib.validate(config)
  mesh = sharding.make_mesh(config.mesh)
  tokenizer = inputs.load_tokenizer(config.tokenizer)
  task = train.build_task(config, tokenizer, mesh)
  abstract = train_state.abstract(
    train.make_init_fn(config, task), optax.identity(), mesh
  )
  folder = snapshot.find(workdir)
  state = checkpoint.load_state(folder, abstract.replace(opt_state=None))
  evaluators = evaluators_lib.build(config, task, tokenizer, mesh, workdir)
  log.info("Evaluating %s", folder)
  results = evaluators_lib.run(evaluators, state)
  if jax.process_index() == 0:
    writers.write_json(os.path.join(workdir, "results.json"), results)
  return results
