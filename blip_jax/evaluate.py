"""Evaluation alone: a run's parameters, or any weights, on the splits of a
config.
"""

import functools
import logging
import os

import jax
import optax
from ml_collections import ConfigDict

from blip_jax import config as config_lib
from blip_jax import evaluators as evaluators_lib
from blip_jax import train
from blip_jax.convert import source
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
  """Runs `config.evals` on the last checkpoint of the workdir, or on
  `config.init.weights` if that is set.

  Writes `results.json` there and returns its content.
  """
  config_lib.validate(config)
  os.makedirs(workdir, exist_ok=True)
  mesh = sharding.make_mesh(config.mesh)
  tokenizer = inputs.load_tokenizer(config.tokenizer)
  task = train.build_task(config, tokenizer, mesh)
  init_fn = train.make_init_fn(config, task)
  tx = optax.identity()
  abstract = train_state.abstract(init_fn, tx, mesh)
  if config.init.weights:
    card = train.make_card(config, task)
    weights = source.open_weights(config.init.weights, card)
    create = functools.partial(train_state.create, init_fn, tx, mesh)
    params, report = checkpoint.load_weights(
      config.init, weights, abstract, create
    )
    state, origin = create(params), f"{weights}\n{report}".rstrip()
  else:
    origin = snapshot.find(workdir)
    state = checkpoint.load_state(origin, abstract.replace(opt_state=None))
  evaluators = evaluators_lib.build(config, task, tokenizer, mesh, workdir)
  log.info("Evaluating %s", origin)
  results = evaluators_lib.run(evaluators, state)
  if jax.process_index() == 0:
    writers.write_json(os.path.join(workdir, "results.json"), results)
  return results
