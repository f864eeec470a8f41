"""What watches a training run: metrics of its steps, their time, alarms."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from blip_jax.runtime import alarms, goodput, metrics, progress, trackers
from blip_jax.runtime.config import Config

log = logging.getLogger(__name__)


class _Running(NamedTuple):
  """A step whose metrics are not read yet.

  Attributes:
    step: its number.
    ids: of the rows of its batch.
    reading: gives its metrics, and when it was done.
    wait: for so many seconds the loop waited for its batch.
    ready: when the batch was there.
  """

  step: int
  ids: list[str]
  reading: futures.Future
  wait: float
  ready: float


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
    began: when the job began, by this clock; by default now.
  """

  def __init__(
    self,
    config: Config,
    workdir: str,
    first_step: int,
    learning_rate: optax.Schedule,
    clock: Callable[[], float] = time.monotonic,
    began: float | None = None,
  ):
    self._config = config
    self._workdir = workdir
    self._first_step = first_step + 1
    # Otherwise the first step that is logged would compile one program for each
    # of its operations.
    self._learning_rate = jax.jit(learning_rate)
    self._clock = clock
    self._began = clock() if began is None else began
    self._goodput = goodput.Goodput(workdir, first_step, self._began)
    open_tracker = lambda: trackers.Tracker(
      config.tracker, workdir, config.to_dict()
    )
    self._writer = metrics.MetricWriter(
      workdir, first_step, open_tracker if config.tracker else None
    )
    if self._goodput.is_continued:
      # Also for the next process, if this one comes to no other row.
      self._writer.write(first_step, self._goodput.metrics(self._began))
    self._reader = futures.ThreadPoolExecutor(1, "metrics")
    self._timer = metrics.StepTimer(config.batch_size)
    self._progress = progress.Progress(config.num_steps)
    self._collapse = alarms.CollapseAlarm()
    self._starved = alarms.StarvedAlarm()
    self._first_called = 0.0
    # Seconds for which steps have waited for their batches, and when the last
    # one was there.
    self._wait, self._waits, self._ready = 0.0, [], 0.0
    # Seconds for which the devices had nothing to do meanwhile.
    self._idles: list[float] = []
    self._profile = metrics.Profile(workdir, config.profile)
    if config.profile:
      first, last = config.profile
      if last < self._first_step or first > config.num_steps:
        log.warning(
          "config.profile: nothing is traced, for this run does the steps %d "
          "to %d, and was asked for %d to %d",
          *(self._first_step, config.num_steps, first, last),
        )
    self._pending: _Running | None = None
    self._done: float | None = None  # when the last step was
    self._stalled = alarms.StallAlarm(clock)

  def next_batch(self, loader: Iterator[Any]) -> Any:
    """Reads the batch of the next step, and how long that takes.

    If reading keeps up with the devices, a batch is ready when it is asked for.
    """
    begin = self._clock()
    self._stalled.watch("the next batch is read")
    batch = next(loader)
    self._ready = self._clock()
    self._wait = self._ready - begin
    return batch

  def dispatching(self, step: int) -> None:
    """Call it before a step: the first call compiles, which takes long."""
    self._profile.before(step)
    if step == self._first_step:
      self._stalled.rest()
      self._progress.say("Compiling the training step ...")
      self._first_called = self._clock()
      self._goodput.add("start", self._first_called - self._began)
    else:
      self._stalled.watch(f"step {step} is running")

  def dispatched(
    self, step: int, step_metrics: Mapping[str, Any], ids: list[str]
  ) -> None:
    """Records a step that is running; reads the one before it."""
    reading = self._reader.submit(metrics.read, step_metrics, self._clock)
    self.flush()
    self._pending = _Running(step, ids, reading, self._wait, self._ready)
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
    step, ids, reading, wait, ready = self._pending
    self._pending = None
    values, done = reading.result()
    # Waiting while the step before was running has cost nothing.
    before = ready if self._done is None else self._done
    self._idles.append(max(0.0, min(ready - before, wait)))
    self._goodput.add("input", self._idles[-1])
    self._done = done
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
    idles, self._idles = self._idles, []
    if "step_time" in values:
      values["input_seconds"] = sum(waits) / len(waits)
      values["idle_seconds"] = sum(idles) / len(idles)
      self._starved.update(step, values["step_time"], values["input_seconds"])
    values |= metrics.device_memory()
    values["lr"] = float(np.asarray(self._learning_rate(step - 1)))
    seconds = {}
    if first:
      seconds["compile_seconds"] = done - self._first_called
      self._goodput.add("compile", seconds["compile_seconds"])
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
      metric: name of the seconds that it takes, a part of goodput's.

    Raises:
      FloatingPointError: the loss of the step is not finite.
    """
    self.flush()
    self._progress.say(f"step {step}: {doing} ...")
    self._stalled.rest()
    begin = self._clock()
    yield
    end = self._clock()
    seconds = end - begin
    self._timer.leave_out(seconds)
    self._goodput.add(metric.removesuffix("_seconds"), seconds)
    self._write(step, {metric: seconds})
    self._writer.write(step, self._goodput.metrics(end))
    took = progress.duration(seconds)
    self._progress.say(f"step {step}: {doing} took {took}")

  def write(self, step: int, results: Mapping[str, float]) -> None:
    """Writes the results of evaluators."""
    self._writer.write(step, results)

  def finish(self, step: int) -> None:
    """Says where the time of the run went, when all of it is done."""
    now = self._clock()
    self._writer.write(step, self._goodput.metrics(now))
    self._progress.say(self._goodput.summary(now))

  def _write(self, step: int, values: Mapping[str, float]) -> None:
    named = {f"train/{name}": value for name, value in values.items()}
    self._writer.write(step, named | self._goodput.age(self._clock()))

  def close(self) -> None:
    self._profile.stop()
    self._stalled.close()
    self._progress.close()
    self._reader.shutdown()
    self._writer.close()
