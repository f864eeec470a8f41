"""How far a job is: a line that is redrawn on terminals, plain lines elsewhere.

Redrawing needs carriage returns, which would turn a log file into one
unreadable line.
"""

import io
import itertools
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import tqdm


class Progress:
  """Shows the steps of a training run; only the first process does.

  Args:
    num_steps: at the end of the run.
    stream: where to; stderr by default.
    clock: in seconds.
  """

  # Seconds between two drawings.
  _INTERVAL = 0.1

  def __init__(
    self,
    num_steps: int,
    stream: io.TextIOBase | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._num_steps = num_steps
    self._stream = sys.stderr if stream is None else stream
    self._clock = clock
    self._quiet = jax.process_index() != 0
    self._redraws = self._stream.isatty() and not self._quiet
    self._metrics: Mapping[str, float] = {}
    self._drawn = ""
    self._drawn_at = -math.inf
    # Messages of the log begin on an empty line.
    self._make_record = logging.getLogRecordFactory()
    if self._redraws:
      logging.setLogRecordFactory(self._make_room)

  def update(
    self, step: int, metrics: Mapping[str, float], *, logged: bool = False
  ) -> None:
    """Shows that a step is done.

    Args:
      step: number of the step.
      metrics: of the step, without the prefix `train/`. On a terminal, those
        that it lacks are shown as they were before.
      logged: whether to show the step where lines cannot be redrawn.
    """
    if not self._redraws:
      if logged:
        self.say("  ".join(_parts(step, self._num_steps, metrics)))
      return
    self._metrics = {**self._metrics, **metrics}
    now = self._clock()
    if now >= self._drawn_at + self._INTERVAL or step == self._num_steps:
      self._drawn_at = now
      parts = _parts(step, self._num_steps, self._metrics)
      self._draw(_fitted(parts, _width(self._stream)))

  def say(self, text: str) -> None:
    """Prints a line that stays."""
    if not self._quiet:
      self._draw("")
      print(text, file=self._stream, flush=True)

  def close(self) -> None:
    """Ends the line, so that what follows begins a new one."""
    if self._drawn:
      print(file=self._stream, flush=True)
      self._drawn = ""
    logging.setLogRecordFactory(self._make_record)

  def _make_room(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
    self._draw("")
    return self._make_record(*args, **kwargs)

  def _draw(self, text: str) -> None:
    """Replaces what is drawn."""
    if text or self._drawn:
      padded = text.ljust(len(self._drawn))
      end = "" if text else "\r"
      print(f"\r{padded}", end=end, file=self._stream, flush=True)
      self._drawn = text


def bar(*args: Any, **kwargs: Any) -> tqdm.tqdm:
  """A bar of tqdm on stderr; where it cannot be redrawn, a line now and then.

  Args:
    *args: as of `tqdm.tqdm`.
    **kwargs: as of `tqdm.tqdm`.
  """
  if not sys.stderr.isatty():
    kwargs |= {"file": _Lines(sys.stderr), "mininterval": _SECONDS_PER_LINE}
  return tqdm.tqdm(*args, **kwargs)


_SECONDS_PER_LINE = 10.0


class _Lines:
  """A stream for tqdm, whose every drawing becomes a line."""

  def __init__(self, stream: Any):
    self._stream = stream

  def write(self, text: str) -> None:
    if text.strip():
      print(text.strip(), file=self._stream)

  def flush(self) -> None:
    self._stream.flush()


def _parts(
  step: int, num_steps: int, metrics: Mapping[str, float]
) -> list[str]:
  """What a line says, the most important first."""
  values = dict(metrics)
  step_time = values.pop("step_time", None)
  speed = values.pop("images_per_second", None)
  parts = [f"step {step}/{num_steps}", f"{100 * step // num_steps}%"]
  if step_time is not None and speed is not None:
    eta = tqdm.tqdm.format_interval(step_time * (num_steps - step))
    parts += [f"{duration(step_time)}/step", f"{speed:.1f} img/s", f"eta {eta}"]
  names = sorted(values, key=lambda name: (not name.startswith("loss"), name))
  return parts + [f"{name} {values[name]:.4g}" for name in names]


def _fitted(parts: list[str], width: int) -> str:
  """As many of the first parts as fit, none of them cut."""
  lines = itertools.accumulate(parts, "{}  {}".format)
  # A line as wide as the terminal would be continued on the next one.
  fitting = [line for line in lines if len(line) < width]
  return fitting[-1] if fitting else ""


def _width(stream: Any) -> int:
  try:
    columns = os.get_terminal_size(stream.fileno()).columns
  except OSError:  # not a real terminal
    columns = 0
  return columns or 80


def duration(seconds: float) -> str:
  """For people: `110 ms` or `6.3 s`."""
  return f"{seconds:,.1f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"
