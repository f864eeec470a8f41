"""The training loop.  It knows no task: see `tasks/base.py` for what it asks.

config -> mesh -> data -> task -> state -> step -> checkpoint -> evaluators
"""

import contextlib
import functools
import logging
import os
import signal
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from blip_jax import config as config_lib
from blip_jax import evaluators as evaluators_lib
from blip_jax import tasks
from blip_jax.convert import beside, source
from blip_jax.data import inputs
from blip_jax.data.tokenizer import Tokenizer
from blip_jax.models import card as card_lib
from blip_jax.models import config as model_config
from blip_jax.runtime import (
  best,
  checkpoint,
  optim,
  sharding,
  train_state,
  writers,
)

State = train_state.TrainState
log = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
  """Trains, evaluates, and returns the final metrics (also `results.json`).

  Given a workdir that holds a run, continues it from its last checkpoint, to
  the same bits as if it had never stopped.
  """
  config_lib.validate(config)
  os.makedirs(workdir, exist_ok=True)

  # 1. Where: devices, and the part of the batch that each takes.
  mesh = sharding.make_mesh(config.mesh)
  check_batch_size(config.batch_size, sharding.num_data_shards(mesh))

  # 2. On what: rows of this process, in an order that the seed decides.
  tokenizer = inputs.load_tokenizer(config.tokenizer)
  loader = inputs.train_loader(
    config, tokenizer, workdir, jax.process_index(), jax.process_count()
  )
  config = config_lib.with_steps(config, loader.rows_per_epoch)

  # 3. What is learned, and how.
  task = build_task(config, tokenizer, mesh)
  tx, learning_rate = optim.make(config.optim, config.num_steps)

  # 4. The state: resumed > restored > initial weights > scratch.
  init_fn = make_init_fn(config, task)
  card = make_card(config, task)
  model_files = beside.model_files(card, tokenizer)
  checkpoints = checkpoint.Checkpoints(
    workdir, **config.checkpoint, model=model_files
  )
  state, origin = checkpoint.initialise(
    config.init,
    functools.partial(source.open_weights, card=card),
    checkpoints,
    train_state.abstract(init_fn, tx, mesh),
    functools.partial(train_state.create, init_fn, tx, mesh),
    loader,
  )
  first_step = int(state.step)
  log.info("Starting at step %d: %s", first_step, origin)
  writers.print_overview(state.params)
  log.info("State: %s", sharding.describe(state, mesh))

  # 5. The program of a step, and what watches over it.
  train_step = make_train_step(task, tx, config.seed)
  evaluators = evaluators_lib.build(config, task, tokenizer, mesh, workdir)
  monitor = Monitor(config, workdir, first_step, learning_rate)
  kept_best = best.Best(
    workdir, _evaluated(config.evals.best, evaluators), model_files
  )
  evaluate = functools.partial(_evaluate, evaluators, monitor, kept_best)
  stop = StopSignal()

  # 6. The loop.  The host reads the metrics of a step while the devices
  # compute the next one, so that they never wait for it.
  with (
    contextlib.closing(loader),
    contextlib.closing(checkpoints),
    contextlib.closing(monitor),
    sharding.activate(mesh),
  ):
    for step in range(first_step + 1, config.num_steps + 1):
      batch, ids = next(loader)
      batch = sharding.put_batch(batch, mesh)
      state, metrics = train_step(state, batch, step - 1)
      monitor.dispatched(step, metrics, ids)

      last = step == config.num_steps
      stopping = stop.requested(step)
      if last or stopping or _due(step, config.checkpoint.every_steps):
        # Nothing is saved that was not found to be finite.
        monitor.flush()
        checkpoints.save(
          step, state, loader, config.to_dict(), force=last or stopping
        )
      if stopping:
        log.warning("Stopped at step %d as asked to; saved.", step)
        return {}
      if not last and _due(step, config.evals.every_steps):
        monitor.flush()
        evaluate(step, state)

    # 7. What came out.
    results = evaluate(config.num_steps, state)
  if results and jax.process_index() == 0:
    writers.write_json(os.path.join(workdir, "results.json"), results)
  return results


def build_task(
  config: ConfigDict, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> tasks.base.Task:
  """The task, for the vocabulary that the tokenizer has."""
  return tasks.build(
    config,
    vocab_size=tokenizer.vocab_size,
    tokens=model_config.SpecialTokens(**tokenizer.special_ids),
    prompt_length=len(tokenizer.prompt_ids(inputs.prompt(config))),
    num_shards=sharding.num_data_shards(mesh),
    num_tensor=mesh.shape["tensor"],
  )


def make_card(config: ConfigDict, task: tasks.base.Task) -> card_lib.Card:
  """What the checkpoints of this run say of its model."""
  decoding = config.get("generation") or {}
  return card_lib.Card(
    config.task, task.model.config, inputs.prompt(config), dict(decoding)
  )


def make_init_fn(config: ConfigDict, task: tasks.base.Task) -> Callable:
  """`params | None -> (params, momentum)`, all from the seed."""

  def init(params: Any | None):
    key_params, key_momentum = jax.random.split(jax.random.key(config.seed))
    if params is None:
      params = task.init(key_params)
    return params, task.init_momentum(params, key_momentum)

  return init


def make_train_step(
  task: tasks.base.Task, tx: optax.GradientTransformation, seed: int
) -> Callable[[State, dict, Int[Array, ""]], tuple[State, dict]]:
  """The jitted step: (state, batch, steps done) -> (state, metrics).

  An update that is not finite is not made.  The host learns of it one step
  later; the count of steps, which then lags behind what the host says, keeps
  every step after it from being made either.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def train_step(state: State, batch: dict, steps_done: Int[Array, ""]):
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    params = task.project(state.params)
    loss = lambda params: task.loss(
      params, state.momentum, batch, rng=rng, step=state.step
    )
    (_, (momentum, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(
      params
    )
    updates, opt_state = tx.update(grads, state.opt_state, params)
    metrics = {**metrics, "grad_norm": optax.tree.norm(grads)}
    new = State(
      step=state.step + 1,
      params=optax.apply_updates(params, updates),
      opt_state=opt_state,
      momentum=momentum,
    )
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    made = finite & (state.step == steps_done)
    keep = lambda new, old: jnp.where(made, new, old)
    return jax.tree.map(keep, new, state), metrics

  return train_step


class Monitor:
  """Reads metrics one step behind, writes them, and raises the alarm."""

  def __init__(
    self,
    config: ConfigDict,
    workdir: str,
    first_step: int,
    learning_rate: optax.Schedule,
  ):
    self._writer = writers.Writer(workdir, first_step)
    self.timer = writers.StepTimer(config.batch_size)
    self._config = config
    self._workdir = workdir
    self._learning_rate = learning_rate
    self._progress = writers.Progress(config.num_steps, first_step)
    self._collapse = writers.CollapseAlarm()
    self._pending = None

  def dispatched(self, step: int, metrics: dict, ids: list[str]) -> None:
    """Takes note of a step under way; reads the one before it."""
    self.flush()
    self._pending = step, metrics, ids

  def flush(self) -> None:
    """Reads the step under way.

    Raises:
      FloatingPointError: its loss is not finite.
    """
    if self._pending is None:
      return
    step, metrics, ids = self._pending
    self._pending = None
    metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    writers.check_finite(self._workdir, step, metrics, ids)
    if "loss_itm" in metrics:
      self._collapse.update(step, metrics["loss_itm"])
    if step == 1 or _due(step, self._config.log_every_steps):
      rate = float(self._learning_rate(step - 1))
      metrics = {**metrics, "lr": rate, **self.timer.tick(step)}
      metrics = {f"train/{name}": value for name, value in metrics.items()}
      self._writer.write(step, metrics)
      self._progress.update(step, metrics)

  def write(self, step: int, results: dict[str, float]) -> None:
    """Keeps what evaluators found."""
    if results:
      self._writer.write(step, results)

  def close(self) -> None:
    self._progress.close()
    self._writer.close()


class StopSignal:
  """SIGTERM, as a scheduler sends it before it takes the machine away."""

  def __init__(self):
    self._received = False
    # Of several processes JAX's own service listens, to let them agree.
    if jax.process_count() == 1:
      signal.signal(signal.SIGTERM, self._receive)

  def _receive(self, *_) -> None:
    self._received = True

  def requested(self, step: int) -> bool:
    """Whether to stop after this step; the same answer on every process."""
    if jax.process_count() == 1:
      return self._received
    return multihost_utils.reached_preemption_sync_point(step)


def check_batch_size(batch_size: int, num_shards: int) -> None:
  if batch_size % num_shards:
    near = max(batch_size // num_shards, 1) * num_shards
    raise ValueError(
      f"config.batch_size: {batch_size} rows do not split over {num_shards} "
      f"data shards (config.mesh.data * config.mesh.fsdp); nearest: {near}"
    )


def _evaluate(
  evaluators: evaluators_lib.Evaluators,
  monitor: Monitor,
  kept_best: best.Best,
  step: int,
  state: State,
) -> dict[str, float]:
  """What evaluators find after a step, written down and compared."""
  with monitor.timer.paused():
    results = evaluators_lib.run(evaluators, state)
    monitor.write(step, results)
    kept_best.update(step, state.params, results)
  return results


def _evaluated(
  metrics: tuple[str, ...], evaluators: evaluators_lib.Evaluators
) -> tuple[str, ...]:
  """The metrics to choose by, unless a split of theirs is left out."""
  splits = {metric.partition("/")[0] for metric in metrics}
  return metrics if splits <= evaluators.keys() else ()


def _due(step: int, every_steps: int) -> bool:
  return every_steps > 0 and step % every_steps == 0
