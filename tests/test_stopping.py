"""Requests to stop, which libraries swallow."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath
from orbax.checkpoint import v1 as ocp

from blip_jax.runtime import saved_arrays, saved_items, stopping


@pytest.fixture
def folder(tmp_path):
  folder = epath.Path(tmp_path / "1")
  ocp.save_checkpointables(folder, {"params": {"w": np.zeros(2)}})
  return folder


def ask(*_, **__):
  signal.raise_signal(signal.SIGTERM)


def swallow():
  """What a library does with a request."""
  with pytest.raises(stopping.Stopped):
    ask()


@pytest.mark.parametrize(
  "read",
  [
    lambda folder: saved_arrays.stored(folder, "params"),
    lambda folder: saved_items.load(folder, "params", {"w": np.zeros(2)}),
  ],
)
def test_a_checkpoint_is_not_damaged_by_a_request_to_stop(
  folder, read, monkeypatch
):
  """Orbax makes another error of it in the middle of its work, or none."""
  read(folder)
  for method in ("metadata", "load"):
    monkeypatch.setattr(ocp.handlers.PyTreeHandler, method, ask)
  with (
    pytest.raises(stopping.Stopped, match="SIGTERM was received"),
    stopping.handled_by(stopping.at_once),
  ):
    read(folder)


def test_an_error_after_a_swallowed_request_is_the_request():
  with (
    pytest.raises(stopping.Stopped) as raised,
    stopping.handled_by(stopping.at_once),
  ):
    swallow()
    raise ValueError("nothing was read")
  assert isinstance(raised.value.__cause__, ValueError)


def test_an_error_in_answer_to_a_request_is_its_own():
  """Such as a full disk on which the state cannot be saved."""
  with (
    pytest.raises(OSError, match="disk is full"),
    stopping.handled_by(stopping.at_once),
  ):
    try:
      ask()
    finally:
      raise OSError("the disk is full")


def test_a_command_that_is_stopped_leaves_no_scratch_folder():
  program = """
import signal, sys
from blip_jax.runtime import command, copies

@command.reports_errors
def main():
  print(copies.scratch_folder(), flush=True)
  signal.raise_signal(signal.SIGTERM)

sys.exit(main())
"""
  words = [sys.executable, "-c", program]
  done = subprocess.run(words, capture_output=True, text=True)
  assert done.returncode == 75, done.stderr
  assert done.stderr.startswith("stopped: SIGTERM")
  assert done.stdout.strip() and not os.path.exists(done.stdout.strip())


def test_a_request_is_over_with_what_handled_it():
  with stopping.handled_by(stopping.at_once):
    swallow()
  stopping.raise_if_swallowed()
  with (
    pytest.raises(ValueError, match="another"),
    stopping.handled_by(stopping.at_once),
  ):
    raise ValueError("another")


def test_a_request_in_a_finaliser_is_raised_again(monkeypatch):
  """Where Python itself ignores all exceptions."""

  class Finalised:
    def __del__(self):
      ask()

  ignored = []
  monkeypatch.setattr(sys, "unraisablehook", ignored.append)
  with pytest.raises(stopping.Stopped), stopping.handled_by(stopping.at_once):
    Finalised()
    assert len(ignored) == 1
    time.sleep(20)


def test_a_request_that_is_handled_is_not_raised_again():
  """A step that is saved may take long."""
  handled = []
  with (
    pytest.raises(stopping.Stopped),
    stopping.handled_by(stopping.at_once),
    contextlib.ExitStack() as stack,
  ):
    stack.callback(lambda: time.sleep(0.3) or handled.append("closed"))
    try:
      ask()
    except stopping.Stopped:
      time.sleep(0.3)
      handled.append("saved")
      raise
  assert handled == ["saved", "closed"]
  assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_alarms_of_others_stay_as_they_are():
  rung = []
  before = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
  signal.setitimer(signal.ITIMER_REAL, 0.1)
  with stopping.handled_by(stopping.at_once):
    pass
  time.sleep(0.2)
  signal.signal(signal.SIGALRM, before)
  assert rung
