"""Evaluation alone: the parameters of a run, or any weights, on the splits of
a config.
"""

import logging
import os
from typing import Any

import jax
import optax

from blip_jax import build, context, task_table
from blip_jax.data import inputs
from blip_jax.evaluators import base
from blip_jax.runtime import config as run_config
from blip_jax.runtime import files, resume, saved_arrays, start
from blip_jax.runtime.config import Config

log = logging.getLogger(__name__)


@start.falls_back
def evaluate(config: Config, workdir: str) -> dict[str, float]:
  """Runs `config.evals` on what the workdir holds, else on `config.init`.

  Writes the results there and returns them: to `results.json`, or, of a
  checkpoint that `config.evals.checkpoint` names, to `NAME/results.json` in the
  folder `evaluated`.

  Raises:
    ValueError: there are no parameters to evaluate.
  """
  files.make_folder(workdir)
  config = context.resolve(config, workdir)
  build.validate(config)
  origin = start.origin(config, workdir)
  if origin.kind == "scratch":
    raise ValueError(
      f"config.job=evaluate: {workdir} holds no checkpoint, and neither "
      "config.init.weights nor config.init.restore names one"
    )
  if origin.is_of_workdir:
    _log_weights_not_evaluated(config, workdir)
  verification = start.verify(origin, ("params", "momentum"))
  run = build.build(config)
  tx = optax.identity()
  state, said = start.initialise(
    origin,
    config.init,
    run.open_weights,
    run.abstract_state(tx).replace(opt_state=None),
    lambda params: run.create_state(params, tx),
  )
  workdir = results_folder(config, workdir)
  files.make_folder(workdir)
  evaluators = build_evaluators(run, workdir)
  log.info("Evaluating %s%s", said, _digest(state.params))
  verification.wait()
  results = base.run(evaluators, state)
  if jax.process_index() == 0:
    files.write_json(os.path.join(workdir, "results.json"), results)
  return results


def results_folder(config: Config, workdir: str | os.PathLike) -> str:
  """Where the results of a checkpoint belong: the last one's in the workdir."""
  asked = config.evals.checkpoint
  if asked == "latest":
    return os.fspath(workdir)
  return os.path.join(workdir, "evaluated", asked)


def _log_weights_not_evaluated(
  config: Config, workdir: str | os.PathLike
) -> None:
  """Says so if weights are named that are not what the run started from."""
  started = resume.config_of(workdir).get("init", {}).get("weights", "")
  if config.init.weights and config.init.weights != started:
    log.info(
      "The run in %s%s is evaluated. config.init.weights=%s is not; to "
      "evaluate it, use another --workdir",
      workdir,
      f", which started from {started}," if started else "",
      config.init.weights,
    )


def _digest(params: Any) -> str:
  """A digest of parameters in words; "" if they are spread over processes."""
  leaves = jax.tree.leaves(params)
  if not all(x.is_fully_addressable or x.is_fully_replicated for x in leaves):
    return ""
  return f"\nDigest of its parameters: {saved_arrays.digest(params)}"


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
