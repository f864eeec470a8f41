"""Evaluation alone: the parameters of a run, or any weights, on the splits of
a config.
"""

import logging
import os

import jax
import optax

from blip_jax import build, task_table
from blip_jax.data import inputs
from blip_jax.evaluators import base
from blip_jax.runtime import checkpoint, files, snapshot
from blip_jax.runtime import config as run_config
from blip_jax.runtime.config import Config

log = logging.getLogger(__name__)


def evaluate(config: Config, workdir: str) -> dict[str, float]:
  """Runs `config.evals` on the last checkpoint of the workdir, or on
  `config.init.weights` if that is set.

  Writes `results.json` there and returns its content.
  """
  build.validate(config)
  files.make_folder(workdir)
  run = build.build(config)
  tx = optax.identity()
  abstract = run.abstract_state(tx)
  if config.init.weights:
    weights = run.open_weights(config.init.weights)
    create = lambda params: run.create_state(params, tx)
    params, report = checkpoint.load_weights(
      config.init, weights, abstract, create
    )
    state, origin = create(params), f"{weights}\n{report}".rstrip()
  else:
    origin = snapshot.find(workdir)
    state = checkpoint.load_state(origin, abstract.replace(opt_state=None))
  evaluators = build_evaluators(run, workdir)
  log.info("Evaluating %s", origin)
  results = base.run(evaluators, state)
  if jax.process_index() == 0:
    files.write_json(os.path.join(workdir, "results.json"), results)
  return results


def build_evaluators(run: build.Run, workdir: str) -> base.Evaluators:
  """The evaluators of each split in `config.evals`, by the split's name.

  Raises:
    ValueError: several splits ask for `samples.png`.
  """
  config = run.config
  splits = run_config.splits(config)
  sheets = [name for name, settings in splits.items() if settings.samples]
  if len(sheets) > 1:
    raise ValueError(
      f"config.evals: samples.png shows one split, but {sheets} ask for it; "
      f"set config.evals.{sheets[-1]}.samples=0"
    )
  bad_samples = inputs.bad_samples(config, workdir, jax.process_index())
  build_split = task_table.of(config).evaluators
  return {
    name: build_split(
      base.Context(
        name,
        settings,
        config,
        run.task,
        run.eval_example,
        run.mesh,
        bad_samples,
        workdir,
      )
    )
    for name, settings in splits.items()
  }
