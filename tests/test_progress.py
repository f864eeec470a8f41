"""A run says the most important first, as a line that fits its terminal."""

import io
import logging
import os
import pathlib
import re

import pytest

from blip_jax.runtime import progress as progress_lib


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


METRICS = {
  "alpha": 0.4,
  "loss_itc": 3.21987,
  "loss": 12.5,
  "lr": 1e-4,
  "step_time": 0.11,
  "images_per_second": 145.3,
}


def test_progress_is_plain_lines_off_a_terminal():
  stream = io.StringIO()
  progress = progress_lib.Progress(1724, stream)
  progress.say("Compiling ...")
  progress.update(1, {"loss_itc": 5.0}, logged=True)
  progress.update(723, METRICS)
  progress.update(724, METRICS, logged=True)
  progress.close()
  assert stream.getvalue() == (
    "Compiling ...\n"
    "step 1/1724  0%  loss_itc 5\n"
    "step 724/1724  41%  110 ms/step  145.3 img/s  eta 01:50  loss 12.5  "
    "loss_itc 3.22  alpha 0.4  lr 0.0001\n"
  )


class Terminal(io.StringIO):
  """Shows text as a terminal does: `screen` has its lines."""

  def isatty(self):
    return True

  def columns(self, monkeypatch, number):
    size = os.terminal_size((number, 24))
    monkeypatch.setattr(progress_lib.os, "get_terminal_size", lambda _: size)
    monkeypatch.setattr(self, "fileno", lambda: 2, raising=False)

  @property
  def screen(self):
    lines = []
    for text in self.getvalue().split("\n"):
      shown = ""
      for drawn in text.split("\r"):
        shown = drawn + shown[len(drawn) :]
      lines.append(shown.rstrip())
    return lines


@pytest.mark.parametrize(
  "columns, expected",
  [
    (200, "{}  loss 12.5  loss_itc 3.22  alpha 0.4  lr 0.0001"),
    (80, "{}  loss 12.5"),
    (63, "{}"),
    (53, "step 724/1724  41%  110 ms/step  145.3 img/s"),
    (8, ""),
    # Some programs make terminals without a size.
    (0, "{}  loss 12.5"),
  ],
)
def test_a_line_that_is_too_long_loses_the_least_important(
  monkeypatch, columns, expected
):
  stream = Terminal()
  stream.columns(monkeypatch, columns)
  progress = progress_lib.Progress(1724, stream)
  progress.update(724, METRICS)
  speed = "step 724/1724  41%  110 ms/step  145.3 img/s  eta 01:50"
  assert stream.screen == [expected.format(speed)]
  progress.close()


def test_a_terminal_shows_one_line_that_moves_and_ends_at_100_percent():
  stream, clock = Terminal(), Clock()
  progress = progress_lib.Progress(30, stream, clock)
  shown = []
  for step in range(1, 31):
    clock.now += 0.06 if step < 30 else 0.0
    progress.update(step, METRICS if step % 10 == 1 else {"loss": step / 10})
    shown.append(stream.screen)
  progress.close()
  speed = "110 ms/step  145.3 img/s"
  assert shown[3][0].startswith(f"step 3/30  10%  {speed}  eta 00:02  loss 0.3")
  assert shown[4][0].startswith(f"step 5/30  16%  {speed}  eta 00:02  loss 0.5")
  assert all(len(lines) == 1 for lines in shown)
  assert stream.screen[0].startswith("step 30/30  100%  110 ms/step")
  assert stream.screen[1:] == [""]


def test_other_lines_do_not_mix_with_the_one_that_is_redrawn(monkeypatch):
  stream = Terminal()
  stream.columns(monkeypatch, 120)
  handler = logging.StreamHandler(stream)
  log = logging.getLogger("tests.progress")
  log.addHandler(handler)
  progress = progress_lib.Progress(1724, stream)
  progress.update(724, METRICS)
  log.warning("no match")
  progress.update(1723, METRICS)
  progress.say("step 1723: saving ...")
  progress.update(1724, {"loss": 1.0})
  progress.close()
  log.warning("finished")
  log.removeHandler(handler)
  assert stream.screen == [
    "no match",
    "step 1723: saving ...",
    "step 1724/1724  100%  110 ms/step  145.3 img/s  eta 00:00  loss 1  "
    "loss_itc 3.22  alpha 0.4  lr 0.0001",
    "finished",
    "",
  ]


def test_after_a_run_the_log_is_as_it_was():
  factory = logging.getLogRecordFactory()
  progress_lib.Progress(10, Terminal()).close()
  assert logging.getLogRecordFactory() is factory


@pytest.mark.parametrize(
  "seconds, text",
  [(0.006, "6 ms"), (0.7, "700 ms"), (63.21, "63.2 s"), (3723.0, "3,723.0 s")],
)
def test_durations(seconds, text):
  assert progress_lib.duration(seconds) == text


def test_only_the_first_process_shows_progress(monkeypatch):
  monkeypatch.setattr(progress_lib.jax, "process_index", lambda: 1)
  for stream in (io.StringIO(), Terminal()):
    progress = progress_lib.Progress(10, stream)
    progress.update(1, {"loss": 1.0}, logged=True)
    progress.say("Compiling ...")
    progress.close()
    assert not stream.getvalue()


def test_a_bar_of_a_job_is_lines_off_a_terminal(capsys):
  with progress_lib.bar(total=400, unit="img") as bar:
    for _ in range(400):
      bar.update()
  _, text = capsys.readouterr()
  assert "\r" not in text and "\n\n" not in text
  assert [line[:4] for line in text.splitlines()] == ["0%| ", "100%"]
  assert "400/400" in text and text.endswith("\n")


def test_a_bar_of_a_job_is_redrawn_on_a_terminal(monkeypatch):
  stream = Terminal()
  monkeypatch.setattr(progress_lib.sys, "stderr", stream)
  assert list(progress_lib.bar([1, 2], unit="img")) == [1, 2]
  assert "\r" in stream.getvalue()
  assert "2/2" in stream.screen[0]


def test_every_bar_of_the_package_is_of_this_kind():
  package = pathlib.Path(progress_lib.__file__).parent.parent
  drawn = {
    path.relative_to(package).as_posix()
    for path in package.rglob("*.py")
    if re.search(r"tqdm\.tqdm\((?!\))", path.read_text())
  }
  # The download of weights is shown on terminals only.
  assert drawn == {"convert/hub.py", "runtime/progress.py"}
