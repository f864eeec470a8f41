"""The engine `array`: task i of n does every n-th work unit from the i-th on.

The tasks of a Slurm job array or of a Kubernetes Indexed Job know i and n from
their environment. They share nothing but the files of the job.
"""

import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from blip_jax.capfilt import progress as progress_lib
from blip_jax.capfilt import worker as worker_lib
from blip_jax.capfilt.engines import handout
from blip_jax.capfilt.work_units import WorkUnit
from blip_jax.runtime.command import UsageError
from blip_jax.runtime.config import Config

log = logging.getLogger(__name__)

_SLURM = "SLURM_ARRAY_TASK_"
_SLURM_TASKS = "SLURM_STEP_NUM_TASKS"
_KUBERNETES = "JOB_COMPLETION_INDEX"
# Kubernetes does not say it: the manifest of the Job does, for us.
_COMPLETIONS = "JOB_COMPLETIONS"
_KEYS = "config.array.index and config.array.count"


class Task(NamedTuple):
  """One of the tasks of an array.

  Attributes:
    index: from 0 on.
    count: of tasks.
  """

  index: int
  count: int


def run(
  config: Config, folder: pathlib.PurePath, work_units: Sequence[WorkUnit]
) -> Sequence[WorkUnit]:
  """Does the share of this task.

  Args:
    config: of the job.
    folder: of its files.
    work_units: all of them.

  Returns:
    The work units of this task, which are done now.

  Raises:
    UsageError: it is not known which task this is.
  """
  task = this_task(config.array.index, config.array.count, os.environ)
  own = work_units[task.index :: task.count]
  log.info(
    "Task %d of %d, counted from 0: %d of %d work units",
    task.index,
    task.count,
    len(own),
    len(work_units),
  )
  if own:
    with (
      worker_lib.started(config, folder, own) as worker,
      progress_lib.Progress(len(own), folder) as progress,
    ):
      worker.label_all(handout.Share(own, worker.ledger), progress)
  return own


def this_task(index: int, count: int, environ: Mapping[str, str]) -> Task:
  """Which task this process is.

  Args:
    index: `config.array.index`; -1: the scheduler says it.
    count: `config.array.count`; 0: the scheduler says it.
    environ: environment variables.

  Raises:
    UsageError: nothing says it, or what says it is no such task, or disagrees.
  """
  if index != -1:
    if count == 0:
      raise UsageError(
        f"config.array.index={index}: config.array.count is missing"
      )
    return _checked("config.array.index", index, "config.array.count", count)
  found = {}
  if f"{_SLURM}ID" in environ:
    found["Slurm"] = _of_slurm(environ)
  if _KUBERNETES in environ:
    found["Kubernetes"] = _of_kubernetes(count, environ)
  if not found:
    raise UsageError(
      f"config.engine=array: expected {_SLURM}ID, as Slurm sets it in a job "
      f"array (sbatch --array=0-7), or {_KUBERNETES}, as Kubernetes sets it in "
      f"an Indexed Job; found neither. Elsewhere set {_KEYS}"
    )
  tasks = set(found.values())
  if len(tasks) > 1:
    said = " and ".join(
      f"{name} says {task.index} of {task.count}"
      for name, task in found.items()
    )
    raise UsageError(
      f"config.engine=array: contradictory variables: {said}. Unset one of "
      f"{_SLURM}ID and {_KUBERNETES}, or set {_KEYS}"
    )
  (task,) = tasks
  if count not in (0, task.count):
    raise UsageError(
      f"config.array.count={count}: the array has {task.count} tasks; leave "
      "the key out, or set config.array.index too"
    )
  return task


def _of_slurm(environ: Mapping[str, str]) -> Task:
  names = ("ID", "MIN", "MAX", "COUNT", "STEP")
  values = [_number(f"{_SLURM}{name}", environ) for name in names]
  id, first, last, count, step = values
  step = max(step, 1)  # of a list, Slurm says 1
  if (last - first) // step + 1 != count or (id - first) % step:
    raise UsageError(
      f"{_SLURM}COUNT={count}: expected a range such as sbatch --array=0-7, "
      f"found a list of {count} from {first} to {last}, in which the place of "
      f"{id} is not known. Name a range, or set {_KEYS}"
    )
  if environ.get(_SLURM_TASKS, "1") != "1":
    raise UsageError(
      f"{_SLURM_TASKS}={environ[_SLURM_TASKS]}: each of them would do the "
      "same; give a task of the array one process (--ntasks=1), or set "
      "config.engine=local, by which processes share work units"
    )
  index = (id - first) // step
  return _checked(f"{_SLURM}ID", index, f"{_SLURM}COUNT", count)


def _of_kubernetes(count: int, environ: Mapping[str, str]) -> Task:
  index = _number(_KUBERNETES, environ)
  if _COMPLETIONS in environ:
    count = _number(_COMPLETIONS, environ)
    return _checked(_KUBERNETES, index, _COMPLETIONS, count)
  if count == 0:
    raise UsageError(
      f"{_KUBERNETES}={index}: Kubernetes does not say of how many. Set the "
      f"variable {_COMPLETIONS}, or config.array.count, to spec.completions of "
      "the Job"
    )
  return _checked(_KUBERNETES, index, "config.array.count", count)


def _number(name: str, environ: Mapping[str, str]) -> int:
  text = environ.get(name, "")
  if not (text.isascii() and text.isdecimal()):
    raise UsageError(f"{name}: expected a number, found {text!r}")
  return int(text)


def _checked(name: str, index: int, count_name: str, count: int) -> Task:
  if not 0 <= index < count:
    raise UsageError(
      f"{name}: expected 0 to {count_name} - 1, which is {count - 1}, found "
      f"{index}"
    )
  return Task(index, count)
