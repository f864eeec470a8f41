"""The training loop.  It knows no task, only the protocol in `tasks/base.py`.

config -> mesh -> data -> task -> state -> step -> checkpoint -> evaluators
"""

import contextlib
import functools
import logging
import os
import signal
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax
from jax import stages
from jax.experimental import multihost_utils
from jaxtyping import Array, Int

from blip_jax import build, context, task_table
from blip_jax import evaluate as evaluate_lib
from blip_jax.data import inputs
from blip_jax.evaluators import base
from blip_jax.runtime import (
  best,
  checkpoint,
  files,
  intervals,
  lock,
  metrics,
  monitoring,
  resume,
  sharding,
  start,
  stopping,
  train_state,
)
from blip_jax.runtime import config as run_config
from blip_jax.runtime.config import Config
from blip_jax.tasks import base as tasks
from blip_jax.tasks import gradients

State = train_state.TrainState
log = logging.getLogger(__name__)


def train(config: Config, workdir: str) -> dict[str, float]:
  """Trains in a workdir, unless another process does.

  Returns:
    The final metrics.

  Raises:
    ValueError: says who works in the workdir, or which setting is wrong.
    stopping.Stopped: SIGTERM or Ctrl-C was received; the state is saved.
  """
  with lock.hold(os.path.join(workdir, ".lock")) as held:
    return _train(config, workdir, held)


@start.falls_back
def _train(config: Config, workdir: str, held: lock.Lock) -> dict[str, float]:
  """Trains, evaluates, and returns the final metrics (also `results.json`).

  A workdir that holds a run is resumed from its last sound checkpoint, and ends
  with the same bits as if it had never stopped.
  """
  began = time.monotonic()
  files.make_folder(workdir)
  config = context.resolve(config, workdir)
  build.validate(config)

  # 1. Where: devices, and the part of the batch that each takes.
  mesh = build.make_mesh(config)

  # 2. On what: rows of this process, in an order that the seed decides.
  tokenizer = build.load_tokenizer(config)
  loader = inputs.train_loader(
    config,
    functools.partial(task_table.of(config).file.example, config, tokenizer),
    workdir,
    jax.process_index(),
    jax.process_count(),
  )
  config = run_config.with_steps(config, loader.rows_per_epoch)

  # 3. What is learned, and how.
  run = build.build(config, mesh, tokenizer)
  tx, learning_rate = run.optimiser

  # 4. The state: resumed > restored > initial weights > scratch.
  # Its files are verified while the step compiles.
  origin = start.origin(config, workdir)
  verification = start.verify(origin)
  if origin.kind in ("resumed", "restored"):
    resume.check(
      origin.source,
      config.to_dict(),
      run.model_files,
      loader.num_rows,
      refuse=origin.kind == "resumed",
    )
  state, said = start.initialise(
    origin,
    config.init,
    run.open_weights,
    run.abstract_state(),
    run.create_state,
    loader,
  )
  first_step = int(state.step)
  c = config.checkpoint
  checkpoints = checkpoint.Checkpoints(
    workdir,
    c.every_steps,
    c.keep,
    c.keep_every_steps,
    c.max_unsaved_steps,
    first_step=first_step,
    model=run.model_files,
  )
  interval = intervals.Interval(c.every_steps, c.every_seconds, first_step)
  log.info("Starting at step %d: %s", first_step, said)
  metrics.log_parameters(state.params)
  log.info("State: %s", sharding.describe(state, mesh))

  # 5. The program of a step, and what monitors it.
  train_step = make_train_step(
    run.task, tx, config.seed, config.grad_accum_steps
  )
  evaluators = evaluate_lib.build_evaluators(run, workdir)
  monitor = monitoring.Monitor(
    config, workdir, first_step, learning_rate, began=began
  )
  kept_best = best.Best(
    workdir, _best_metrics(config.evals.best, evaluators), run.model_files
  )
  measure = functools.partial(_evaluate, evaluators, monitor, kept_best)

  # 6. The loop.  The host reads the metrics of a step while the devices
  # compute the next one, so that they never wait for it.
  with (
    contextlib.closing(loader),
    contextlib.closing(checkpoints),
    contextlib.closing(monitor),
    sharding.activate(mesh),
    StopSignal() as stop,
  ):

    def save(step: int, now: bool) -> None:
      held.check()
      with monitor.paused(step, "saving", "save_seconds"):
        if now:
          checkpoints.save_now(step, state, loader, config.to_dict())
        else:
          checkpoints.save(step, state, loader, config.to_dict(), force=True)

    for step in range(first_step + 1, config.num_steps + 1):
      batch, ids = monitor.next_batch(loader)
      batch = sharding.put_batch(batch, mesh)
      monitor.dispatching(step)
      state, step_metrics = train_step(state, batch, step - 1)
      verification.wait()
      monitor.dispatched(step, step_metrics, ids)

      last = step == config.num_steps
      is_asked = stop.requested(step)
      is_due = interval.due(step, checkpoints.is_busy, monitor.flush)
      is_due |= checkpoints.is_overdue(step)
      if last or is_asked or is_due:
        # Only a state that is known to be finite is saved.
        save(step, now=last or is_asked)
      if is_asked:
        raise stopping.Stopped(f"step {step} is done and saved")
      if not last and _due(step, config.evals.every_steps):
        try:
          with stop.at_once():
            measure(step, state)
        except stopping.Stopped:
          save(step, now=True)
          raise

    # 7. The results.
    verification.wait()
    with stop.at_once():
      results = measure(config.num_steps, state)
    monitor.finish(config.num_steps)
  if results and jax.process_index() == 0:
    files.write_json(os.path.join(workdir, "results.json"), results)
  return results


def make_train_step(
  task: tasks.Task,
  tx: optax.GradientTransformation,
  seed: int,
  accum_steps: int = 1,
) -> stages.Wrapped:
  """The jitted step: (state, batch, steps done) -> (state, metrics).

  Gradients are those of the batch at once, or accumulated over `accum_steps`
  micro-batches.

  An update that is not finite is not applied.  The host learns of it one step
  later.  Until then the state counts fewer steps than the host, and so no
  further update is applied either.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def train_step(state: State, batch: dict, steps_done: Int[Array, ""] | int):
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    params = task.clamp(state.params)
    grads, (momentum, metrics) = gradients.of_batch(
      task,
      params,
      state.momentum,
      batch,
      rng=rng,
      step=state.step,
      accum_steps=accum_steps,
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
    applied = finite & (state.step == steps_done)
    keep = lambda new, old: jnp.where(applied, new, old)
    return jax.tree.map(keep, new, state), metrics

  return train_step


class StopSignal:
  """A request to stop, which a step heeds at its end, and others at once.

  Such as SIGTERM, which a scheduler sends before it takes the machine away;
  see `stopping`.
  """

  def __init__(self):
    self._received = 0
    self._at_once = False
    self._stack = contextlib.ExitStack()

  def __enter__(self) -> "StopSignal":
    handle = self._receive if jax.process_count() == 1 else _tell_all
    self._stack.enter_context(stopping.handled_by(handle, *self._signals()))
    return self

  def __exit__(self, *_) -> None:
    self._stack.close()

  def _signals(self) -> tuple[signal.Signals, ...]:
    # With several processes, JAX's own service listens to SIGTERM and lets
    # them agree.
    signals = (signal.SIGUSR1, signal.SIGINT)
    return signals if jax.process_count() > 1 else (signal.SIGTERM, *signals)

  def _receive(self, number: int) -> None:
    self._received = number
    if self._at_once:
      stopping.at_once(number)

  def requested(self, step: int) -> bool:
    """Whether to stop after this step; the same answer on every process."""
    if jax.process_count() == 1:
      return self._received > 0
    return multihost_utils.reached_preemption_sync_point(step)

  @contextlib.contextmanager
  def at_once(self) -> Iterator[None]:
    """Raises `stopping.Stopped` within it, if this is the only process."""
    self._at_once = True
    try:
      if self._received:
        stopping.at_once(self._received)
      yield
    finally:
      self._at_once = False


def _tell_all(_: int) -> None:
  os.kill(os.getpid(), signal.SIGTERM)


def _evaluate(
  evaluators: base.Evaluators,
  monitor: monitoring.Monitor,
  kept_best: best.Best,
  step: int,
  state: State,
) -> dict[str, float]:
  """Runs the evaluators after a step; writes and compares their results."""
  if not evaluators:
    return {}
  with monitor.paused(step, "evaluating", "eval_seconds"):
    results = base.run(evaluators, state)
    monitor.write(step, results)
    kept_best.update(step, state.params, results)
  return results


def _best_metrics(
  metrics: tuple[str, ...], evaluators: base.Evaluators
) -> tuple[str, ...]:
  """The metrics that select `best`, unless one of their splits is absent."""
  splits = {metric.partition("/")[0] for metric in metrics}
  return metrics if splits <= evaluators.keys() else ()


def _due(step: int, every_steps: int) -> bool:
  return every_steps > 0 and step % every_steps == 0
