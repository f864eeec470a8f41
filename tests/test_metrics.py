"""Metrics can be read back; the time of a step is only its own."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from blip_jax.runtime import metrics


def lines(workdir):
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_one_flat_json_object_per_line(tmp_path):
  writer = metrics.MetricWriter(tmp_path)
  writer.write(1, {"train/loss_itc": jnp.float32(3.5), "train/lr": 1e-4})
  writer.write(2, {"scenes_val/txt_r1": np.float64(80)})
  # Readable while the run goes on.
  assert lines(tmp_path) == [
    {"step": 1, "train/loss_itc": 3.5, "train/lr": 1e-4},
    {"step": 2, "scenes_val/txt_r1": 80.0},
  ]
  writer.close()


def test_numbers_that_json_lacks_become_words(tmp_path):
  writer = metrics.MetricWriter(tmp_path)
  values = [math.nan, math.inf, -math.inf]
  writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
  writer.close()

  def refuse(word):
    raise AssertionError(f"{word} is not JSON")

  line = (tmp_path / "metrics.jsonl").read_text()
  read = json.loads(line, parse_constant=refuse)
  assert read == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
  np.testing.assert_array_equal([float(read[k]) for k in "abc"], values)


def test_resuming_takes_back_what_was_written_after_the_checkpoint(tmp_path):
  writer = metrics.MetricWriter(tmp_path)
  for step in (1, 2, 3, 4):
    writer.write(step, {"train/loss": step})
  writer.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 5, "train/lo')  # killed in the middle of a line
  writer = metrics.MetricWriter(tmp_path, start_step=2)
  writer.write(3, {"train/loss": 30})
  writer.close()
  assert [(r["step"], r["train/loss"]) for r in lines(tmp_path)] == [
    (1, 1),
    (2, 2),
    (3, 30),
  ]


def test_tensorboard_reads_the_same_numbers(tmp_path):
  writer = metrics.MetricWriter(tmp_path)
  for step in (1, 2, 3):
    writer.write(step, {"train/loss": step / 2})
  writer.close()
  writer = metrics.MetricWriter(tmp_path, start_step=2)
  writer.write(3, {"train/loss": 9.0})
  writer.close()
  assert scalars(tmp_path / "tb") == [(1, 0.5), (2, 1.0), (3, 9.0)]


def scalars(folder):
  """Reads event files as TensorBoard does: a START hides what it repeats."""
  found = []
  for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    while data:
      # A record is its length, 8 bytes; a checksum, 4; itself; a checksum, 4.
      size = int.from_bytes(data[:8], "little")
      event = event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]
      if event.session_log.status == event_pb2.SessionLog.START:
        found = [(step, value) for step, value in found if step < event.step]
      for value in event.summary.value:
        found.append((event.step, value.simple_value))
  return found


def test_only_the_first_process_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
  writer = metrics.MetricWriter(tmp_path)
  writer.write(1, {"train/loss": 1.0})
  writer.close()
  assert not list(tmp_path.iterdir())


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def test_time_of_a_step_without_compilation_and_pauses():
  timer = metrics.StepTimer(batch_size=32)
  timer.leave_out(5.0)  # nothing to leave it out of
  assert timer.so_far(1, 60.0) == {}
  timer.restart(1, 60.0)
  assert timer.so_far(3, 62.0)["step_time"] == 1.0
  times = {"step_time": 0.5, "images_per_second": 64.0}
  assert timer.so_far(10, 64.5) == times
  timer.restart(10, 64.5)
  timer.leave_out(1000.0)
  timer.leave_out(10.0)
  assert timer.so_far(14, 1076.5) == times


def test_the_time_of_a_step_is_taken_when_its_metrics_are_there():
  clock = Clock()

  class Loss:
    def __array__(self, *_, **__):
      clock.now += 7
      return np.float32(2.5)

  read = metrics.read({"loss": Loss(), "lr": jnp.float32(0.5)}, clock)
  assert read == ({"loss": 2.5, "lr": 0.5}, 107.0)


PARAMS = {
  "temp": jnp.float32(0.07),
  "text_encoder": {"kernel": jnp.ones((640, 400)), "bias": jnp.ones(400)},
  "itm_head": {"bias": jnp.ones(2, jnp.bfloat16)},
}


def test_parameters_are_one_line():
  assert metrics.parameter_summary(PARAMS) == (
    "256,403 parameters, 1.0 MiB: text_encoder 256,400, itm_head 2, temp 1"
  )


@pytest.mark.parametrize("level, number", [("INFO", 0), ("DEBUG", 1)])
def test_the_table_of_parameters_is_shown_on_request(caplog, level, number):
  with caplog.at_level(level, "blip_jax"):
    metrics.log_parameters(PARAMS)
  assert caplog.text.count("text_encoder/kernel ") == number
  assert caplog.text.count("256,403 parameters") == 1


def test_no_time_has_passed():
  timer = metrics.StepTimer(batch_size=32)
  timer.restart(1, 60.0)
  assert timer.so_far(2, 60.0) == timer.so_far(2, 59.0) == {}
  assert timer.so_far(2, 60.5) == {"step_time": 0.5, "images_per_second": 64.0}


def test_a_damaged_line_costs_that_line(tmp_path):
  path = tmp_path / "metrics.jsonl"
  sound = ['{"step": 1, "a": 0.1}\n', '{"step": 2, "a": "NaN"}\n']
  path.write_text(
    sound[0] + '{"step": \n[1]\n{"a": 2}\n{"step": "1"}\n' + sound[1]
  )
  metrics.MetricWriter(tmp_path, start_step=2).close()
  assert path.read_text() == "".join(sound)
