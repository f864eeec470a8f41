"""Reported times are those of steps, whatever a run does between them."""

import json
from concurrent import futures

import numpy as np
import pytest

from blip_jax import defaults
from blip_jax.runtime import metrics, monitoring

COMPILE, STEP, SAVE, EVAL = 60.0, 0.7, 2.1, 12.0


class Device:
  """Runs steps one after another, in simulated seconds.

  Args:
    blocks: whether the call of a step returns only when the step is done.
  """

  def __init__(self, blocks):
    self._blocks = blocks
    self._done = 0.0
    self.host = 0.0

  def clock(self):
    return self.host

  def call(self, seconds):
    """Returns what a step returns, its metrics."""
    self._done = max(self.host, self._done) + seconds
    if self._blocks:
      self.host = self._done
    return {"loss": Loss(self, self._done)}


class Loss:
  """The loss of a step; whoever reads it waits until the step is done."""

  def __init__(self, device, done):
    self.device, self.done = device, done

  def __array__(self, *_, **__):
    self.device.host = max(self.device.host, self.done)
    return np.float32(1.0)


class Reader(futures.Executor):
  """A thread that is ready whenever a step is done.

  The simulation has one clock, so that the thread runs at the time at which
  its step is done, as soon as the loop waits for it.
  """

  def __init__(self, *_):
    pass

  def submit(self, read, metrics, clock):
    loss = metrics["loss"]
    reading = futures.Future()

    def result():
      host, loss.device.host = loss.device.host, loss.done
      value = read(metrics, clock)
      loss.device.host = max(host, loss.done)
      return value

    reading.result = result
    return reading


def rows(workdir):
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def of(workdir, name):
  """The values of a metric, by step."""
  return {
    row["step"]: pytest.approx(row[f"train/{name}"])
    for row in rows(workdir)
    if f"train/{name}" in row
  }


def run(
  workdir,
  monkeypatch,
  *,
  first_step=0,
  num_steps=36,
  log_every=10,
  blocks=False,
  loading=0.0,
):
  """A run that saves at multiples of 15 and at the end, evaluates at 20 and at
  the end, and needs `loading` seconds for the data of a step."""
  monkeypatch.setattr(monitoring.futures, "ThreadPoolExecutor", Reader)
  device = Device(blocks)
  config = defaults.training("caption")
  config.update({"num_steps": num_steps, "log_every_steps": log_every})
  config.batch_size = 7
  monitor = monitoring.Monitor(
    config, str(workdir), first_step, lambda step: 0.1, device.clock
  )

  def batches():
    while True:
      device.host += loading
      yield "batch"

  loader = batches()
  for step in range(first_step + 1, num_steps + 1):
    assert monitor.next_batch(loader) == "batch"
    monitor.dispatching(step)
    first = step == first_step + 1
    if first:
      device.host += COMPILE
    monitor.dispatched(step, device.call(STEP), [])
    if step % 15 == 0 or step == num_steps:
      with monitor.paused(step, "saving", "save_seconds"):
        device.host += SAVE
    if step == 20 or step == num_steps:
      with monitor.paused(step, "evaluating", "eval_seconds"):
        device.host += EVAL
        monitor.write(step, {"val/R": 1.0})
  monitor.close()


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("log_every", [1, 10])
@pytest.mark.parametrize("first_step", [0, 17])
def test_every_step_time_is_that_of_a_step(
  tmp_path, monkeypatch, blocks, log_every, first_step
):
  run(
    tmp_path,
    monkeypatch,
    first_step=first_step,
    log_every=log_every,
    blocks=blocks,
  )
  first = first_step + 1
  logged = {s for s in range(first, 37) if s % log_every == 0} | {first, 36}
  assert of(tmp_path, "loss").keys() == logged
  expected = dict.fromkeys(logged - {first}, STEP)
  assert of(tmp_path, "step_time") == expected
  assert of(tmp_path, "images_per_second") == dict.fromkeys(expected, 10.0)


@pytest.mark.parametrize("blocks", [False, True])
def test_pauses_and_compilation_are_reported_apart(
  tmp_path, monkeypatch, blocks
):
  run(tmp_path, monkeypatch, blocks=blocks)
  assert of(tmp_path, "compile_seconds") == {1: COMPILE + STEP}
  assert of(tmp_path, "save_seconds") == {15: SAVE, 30: SAVE, 36: SAVE}
  assert of(tmp_path, "eval_seconds") == {20: EVAL, 36: EVAL}


@pytest.mark.parametrize("blocks", [False, True])
def test_a_run_that_waits_for_data_is_as_slow_as_its_data(
  tmp_path, monkeypatch, blocks
):
  run(tmp_path, monkeypatch, blocks=blocks, log_every=1, loading=2.0)
  # The next data load while a step is running, but not while the call of a
  # step blocks, or a pause has to wait for the step.
  alone = range(2, 37) if blocks else (16, 21, 31)
  expected = {step: 2.0 + STEP * (step in alone) for step in range(2, 37)}
  assert of(tmp_path, "step_time") == expected
  assert of(tmp_path, "input_seconds") == dict.fromkeys(range(2, 37), 2.0)
  idle = {step: 2.0 - STEP * (step not in alone) for step in range(2, 37)}
  assert of(tmp_path, "idle_seconds") == idle


@pytest.mark.parametrize("loading, warnings", [(0.6, 0), (0.8, 1)])
def test_a_run_says_once_that_it_waits_for_data(
  tmp_path, monkeypatch, caplog, loading, warnings
):
  """The call of a step blocks here, so that it takes STEP and the loading."""
  run(tmp_path, monkeypatch, blocks=True, log_every=1, loading=loading)
  assert caplog.text.count("the devices wait for examples") == warnings


def test_the_memory_of_a_device_is_reported_where_it_tells(
  tmp_path, monkeypatch
):
  class Told:
    def memory_stats(self):
      return {"peak_bytes_in_use": 3 * 2**29}

  monkeypatch.setattr(metrics.jax, "local_devices", lambda: [Told()])
  run(tmp_path, monkeypatch, num_steps=3, log_every=1)
  assert of(tmp_path, "device_memory_gib") == {1: 1.5, 2: 1.5, 3: 1.5}
  monkeypatch.setattr(Told, "memory_stats", lambda self: None)
  assert metrics.device_memory() == {}


def test_a_trace_has_the_steps_that_were_asked_for(tmp_path, monkeypatch):
  calls = []
  profiler = metrics.jax.profiler
  start, stop = profiler.start_trace, profiler.stop_trace
  monkeypatch.setattr(
    profiler,
    "start_trace",
    lambda folder: calls.append("start") or start(folder),
  )
  monkeypatch.setattr(
    profiler, "stop_trace", lambda: calls.append("stop") or stop()
  )
  profile = metrics.Profile(tmp_path, (3, 4))
  for step in range(1, 7):
    profile.before(step)
    calls.append(step)
    if profile.ends_after(step):
      profile.stop()
  profile.stop()
  assert calls == [1, 2, "start", 3, 4, "stop", 5, 6]
  assert [*tmp_path.glob("profile/**/*.xplane.pb")]


def test_steps_are_read_in_their_order(tmp_path, monkeypatch):
  """By one thread."""
  made = []
  monkeypatch.setattr(
    monitoring.futures,
    "ThreadPoolExecutor",
    lambda *args: made.append(args) or Reader(*args),
  )
  config = defaults.training("caption")
  monitoring.Monitor(config, str(tmp_path), 0, lambda step: 0.1).close()
  assert made == [(1, "metrics")]


@pytest.mark.parametrize(
  "first_step, steps, warns",
  [
    (0, (4, 5), True),
    (3, (1, 3), True),
    (0, (3, 9), False),
    (2, (1, 3), False),
    (3, (), False),
  ],
)
def test_steps_that_are_never_traced_are_told(
  tmp_path, caplog, first_step, steps, warns
):
  config = defaults.training("caption")
  config.update({"num_steps": 3, "profile": steps})
  constant = lambda step: 0.1
  monitoring.Monitor(config, str(tmp_path), first_step, constant).close()
  assert ("config.profile: nothing is traced" in caplog.text) == warns
