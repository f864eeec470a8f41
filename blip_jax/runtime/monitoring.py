"""What watches a training run: metrics of its steps, their time, alarms."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

import numpy as np
import optax

from blip_jax.runtime import alarms, metrics, progress
from blip_jax.runtime.config import Config


class Monitor:
  """Reads metrics one step behind, writes them, and raises the alarm.

  A thread waits for each step, so that its time is taken when it is done, and
  not when the loop comes to ask for its metrics: some devices return from a
  call only when the step is done, and then the loop is late by one step.

  Args:
    config: of the run.
    workdir: the run's folder.
    first_step: number of steps done before.
    learning_rate: by number of steps done.
    clock: in seconds.
  """

  def __init__(
    self,
    config: Config,
    workdir: str,
    first_step: int,
    learning_rate: optax.Schedule,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._config = config
    self._workdir = workdir
    self._first_step = first_step + 1
    self._learning_rate = learning_rate
    self._clock = clock
    self._writer = metrics.MetricWriter(workdir, first_step)
    self._reader = futures.ThreadPoolExecutor(1, "metrics")
    self._timer = metrics.StepTimer(config.batch_size)
    self._progress = progress.Progress(config.num_steps)
    self._collapse = alarms.CollapseAlarm()
    self._starved = alarms.StarvedAlarm()
    self._first_called = 0.0
    # Seconds for which steps have waited for their batches.
    self._wait, self._waits = 0.0, []
    self._profile = metrics.Profile(workdir, config.profile)
    self._pending: tuple[int, list[str], futures.Future, float] | None = None

  def next_batch(self, loader: Iterator[Any]) -> Any:
    """Reads the batch of the next step, and how long that takes.

    If reading keeps up with the devices, a batch is ready when it is asked for.
    """
    begin = self._clock()
    batch = next(loader)
    self._wait = self._clock() - begin
    return batch

  def dispatching(self, step: int) -> None:
    """Call it before a step: the first call compiles, which takes long."""
    self._profile.before(step)
    if step == self._first_step:
      self._progress.say("Compiling the training step ...")
      self._first_called = self._clock()

  def dispatched(
    self, step: int, step_metrics: Mapping[str, Any], ids: list[str]
  ) -> None:
    """Records a step that is running; reads the one before it."""
    reading = self._reader.submit(metrics.read, step_metrics, self._clock)
    self.flush()
    self._pending = step, ids, reading, self._wait
    if self._profile.ends_after(step):
      self.flush()
      self._profile.stop()

  def flush(self) -> None:
    """Waits for the step that is running, if any, and reads its metrics.

    Raises:
      FloatingPointError: its loss is not finite.
    """
    if self._pending is None:
      return
    step, ids, reading, wait = self._pending
    self._pending = None
    values, done = reading.result()
    alarms.check_finite(self._workdir, step, values, ids)
    if "loss_itm" in values:
      self._collapse.update(step, values["loss_itm"])
    self._waits.append(wait)
    first, last = step == self._first_step, step == self._config.num_steps
    logged = first or last or step % self._config.log_every_steps == 0
    values |= self._timer.so_far(step, done)
    if not logged:
      self._progress.update(step, values)
      return
    # The first step has been compiled, and is left out.
    self._timer.restart(step, done)
    waits, self._waits = self._waits, []
    if "step_time" in values:
      values["input_seconds"] = sum(waits) / len(waits)
      self._starved.update(step, values["step_time"], values["input_seconds"])
    values |= metrics.device_memory()
    values["lr"] = float(np.asarray(self._learning_rate(step - 1)))
    seconds = {}
    if first:
      seconds["compile_seconds"] = done - self._first_called
      took = progress.duration(seconds["compile_seconds"])
      self._progress.say(f"Compiled the training step and ran it in {took}")
    self._progress.update(step, values, logged=True)
    self._write(step, {**values, **seconds})

  @contextlib.contextmanager
  def paused(self, step: int, doing: str, metric: str) -> Iterator[None]:
    """Stops the clock of the steps while something else is done.

    Args:
      step: the last step that was dispatched; it is read first.
      doing: what is done, for the log.
      metric: name of the seconds that it takes.

    Raises:
      FloatingPointError: the loss of the step is not finite.
    """
    self.flush()
    self._progress.say(f"step {step}: {doing} ...")
    begin = self._clock()
    yield
    seconds = self._clock() - begin
    self._timer.leave_out(seconds)
    self._write(step, {metric: seconds})
    took = progress.duration(seconds)
    self._progress.say(f"step {step}: {doing} took {took}")

  def write(self, step: int, results: Mapping[str, float]) -> None:
    """Writes the results of evaluators."""
    self._writer.write(step, results)

  def _write(self, step: int, values: Mapping[str, float]) -> None:
    self._writer.write(step, {f"train/{k}": v for k, v in values.items()})

  def close(self) -> None:
    self._profile.stop()
    self._progress.close()
    self._reader.shutdown()
    self._writer.close()
