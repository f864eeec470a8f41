"""Goodput: the share of a run's time in which it made steps that count.

A run is the work of several processes if it was stopped or killed. Each row of
`metrics.jsonl` says how old the run was, so that the next process knows what
the steps after the last checkpoint, which it has to do again, had taken.
"""

import os
from collections.abc import Mapping
from typing import Any

from blip_jax.runtime import files, progress

# What takes time beside steps that count, and how it is called in a sentence:
# until the first step, with loading; compiling; devices without a batch; steps
# that wait for a checkpoint; evaluators; and steps that a kill has undone.
PARTS = {
  "start": "starting",
  "compile": "compiling",
  "input": "waiting for examples",
  "save": "saving",
  "eval": "evaluating",
  "lost": "lost by kills",
}
_TOTAL = "goodput/total_seconds"


class Goodput:
  """Where the time of a run went so far.

  Only time in a process counts, from the beginning of the job in it.

  Attributes:
    is_continued: whether another process has worked on the run before.

  Args:
    workdir: the run's folder.
    start_step: from which this process goes on. Rows of later steps must still
      be in `metrics.jsonl`.
    began: when this process began, by the clock of `metrics`.
  """

  def __init__(self, workdir: str | os.PathLike, start_step: int, began: float):
    before, age = _read(workdir, start_step)
    self._seconds: dict[str, float] = {
      part: before.get(f"goodput/{part}_seconds", 0.0) for part in PARTS
    }
    self.add("lost", age - before.get(_TOTAL, 0.0))
    self.is_continued = age > 0
    # When the run would have begun, had one process done all of it.
    self._began = began - age

  def add(self, part: str, seconds: float) -> None:
    """Counts time that one of PARTS took."""
    self._seconds[part] += max(seconds, 0.0)

  def age(self, now: float) -> dict[str, float]:
    """How long the run has taken so far, for every row."""
    return {_TOTAL: now - self._began}

  def metrics(self, now: float) -> dict[str, float]:
    """The seconds of all parts, and of steps that count, and their share."""
    total = now - self._began
    useful = max(total - sum(self._seconds.values()), 0.0)
    return {
      "goodput/fraction": useful / total if total > 0 else 0.0,
      "goodput/useful_seconds": useful,
      **{f"goodput/{name}_seconds": self._seconds[name] for name in PARTS},
      _TOTAL: total,
    }

  def summary(self, now: float) -> str:
    """The same, in a sentence."""
    values = self.metrics(now)
    rest = [
      f"{words} {progress.duration(values[f'goodput/{part}_seconds'])}"
      for part, words in PARTS.items()
      if values[f"goodput/{part}_seconds"] > 0
    ]
    return (
      f"Goodput {values['goodput/fraction']:.1%}: of "
      f"{progress.duration(values[_TOTAL])}, "
      f"{progress.duration(values['goodput/useful_seconds'])} were steps; "
      f"{', '.join(rest)}"
    )


def _read(
  workdir: str | os.PathLike, start_step: int
) -> tuple[Mapping[str, Any], float]:
  """What the rows of earlier processes say.

  Returns:
    The last row with all parts that belongs to the run as it goes on; and how
    old the run became, steps that are lost included.
  """
  path = files.as_path(workdir) / "metrics.jsonl"
  before: Mapping[str, Any] = {}
  age = 0.0
  for row in files.json_lines(path) if files.exists(path) else ():
    total = row.get(_TOTAL)
    if type(row.get("step")) is not int or type(total) is not float:
      continue
    age = max(age, total)
    if row["step"] <= start_step and "goodput/fraction" in row:
      before = row
  return before, age
