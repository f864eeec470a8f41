"""Metrics can be read back, and the progress line fits where it is shown."""

import io
import json
import math

import jax.numpy as jnp
import numpy as np
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
  stream = io.StringIO()
  metrics.Progress(10, stream=stream).update(1, {"train/loss": 1.0})
  metrics.print_overview({"temp": jnp.ones(())}, stream)
  assert not list(tmp_path.iterdir()) and not stream.getvalue()


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


def test_timer_leaves_out_compilation_and_pauses():
  clock = Clock()
  timer = metrics.StepTimer(batch_size=32, clock=clock)
  clock.now += 60  # compilation, and step 1
  assert timer.tick(1) == {}
  clock.now += 4.5
  assert timer.tick(10) == {"step_time": 0.5, "images_per_second": 64.0}
  clock.now += 1
  with timer.paused():
    clock.now += 1000
  clock.now += 1
  assert timer.tick(14)["step_time"] == 0.5


METRICS = {
  "train/loss_itc": 3.21987,
  "train/lr": 1e-4,
  "step_time": 0.11,
  "images_per_second": 145.3,
}


def test_progress_is_plain_lines_off_a_terminal():
  stream = io.StringIO()
  progress = metrics.Progress(1724, stream=stream)
  progress.update(1, {"train/loss_itc": 5.0})
  progress.update(724, METRICS)
  progress.close()
  assert stream.getvalue() == (
    "step 1/1724  loss_itc 5\n"
    "step 724/1724  loss_itc 3.22  lr 0.0001  110 ms/step  145.3 img/s  "
    "eta 01:50\n"
  )


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_is_a_bar_on_a_terminal():
  stream = Terminal()
  progress = metrics.Progress(1724, start_step=700, stream=stream)
  progress.update(724, METRICS)
  progress.close()
  text = stream.getvalue()
  assert "\r" in text and "700/1724" in text
  assert "724/1724, loss_itc 3.22" in text and "eta 01:50" in text


def test_overview_names_every_parameter_once():
  stream = io.StringIO()
  metrics.print_overview({"itm_head": {"bias": jnp.ones(2)}}, stream)
  assert stream.getvalue().count("itm_head/bias") == 1
  assert "Total: 2" in stream.getvalue()
