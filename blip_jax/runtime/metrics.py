"""Metrics of a run: files for programs and TensorBoard; time of a step."""

import io
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from clu import parameter_overview

from blip_jax.runtime import copies, files, trackers

log = logging.getLogger(__name__)

# A workdir in an object store gets a copy of `tb/` as often.
_TB_SECONDS = 60.0


def log_parameters(params: Any) -> None:
  """Logs their number, by part and in bytes; at level DEBUG, each of them."""
  log.info("%s", parameter_summary(params))
  if log.isEnabledFor(logging.DEBUG):
    # Means and deviations would gather every weight to this host.
    table = parameter_overview.get_parameter_overview(
      params, include_stats="sharding"
    )
    log.debug("Parameters:\n%s", table)


def parameter_summary(params: Any) -> str:
  """One line: the number of parameters, their bytes, and the largest parts.

  Args:
    params: a dict of parts, each an array or a tree of arrays.
  """
  sizes = {name: _size(part) for name, part in params.items()}
  num_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
  parts = [
    f"{name} {size:,}"
    for name, size in sorted(sizes.items(), key=lambda item: -item[1])
  ]
  return (
    f"{sum(sizes.values()):,} parameters, {num_bytes / 2**20:,.1f} MiB: "
    f"{', '.join(parts)}"
  )


def _size(tree: Any) -> int:
  return sum(x.size for x in jax.tree.leaves(tree))


class MetricWriter:
  """Writes metrics to `WORKDIR/metrics.jsonl` and, for TensorBoard, `tb/`.

  Only the first process writes. A run that resumes at `start_step` removes what
  the previous process wrote after it, so that no step appears twice. Where
  nothing can be written, such as on a full disk, metrics wait in memory.

  Args:
    workdir: the run's folder.
    start_step: from which the run goes on.
    open_tracker: what gets them, too.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    start_step: int = 0,
    open_tracker: Callable[[], trackers.Tracker] | None = None,
  ):
    self._tracker: trackers.Tracker | None = None
    self._file: io.IOBase | None = None
    if jax.process_index() != 0:
      return
    self._path = files.as_path(workdir) / "metrics.jsonl"
    files.make_folder(workdir)
    if files.exists(self._path):
      lines = "".join(_lines_up_to(self._path, start_step))
      files.write_text(self._path, lines)
    file = files.open_append_bytes(self._path)
    # What a buffer takes may be lost: a file on a disk is written without one.
    self._buffer, self._file = file, getattr(file, "raw", file)
    self._unwritten = b""
    self._waiting: list[tuple[int, dict[str, float]]] = []
    self._is_failing = False
    self._tracker = open_tracker() if open_tracker else None
    self._tb = copies.Mirror(files.as_path(workdir) / "tb")
    self._tensorboard = self._open_tensorboard(start_step)

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Appends one line, `{"step": 50, "train/loss_itc": 3.1, ...}`."""
    if self._file is None:
      return
    values = {name: float(value) for name, value in metrics.items()}
    line = json.dumps(files.jsonable({"step": step, **values})) + "\n"
    self._unwritten += line.encode()
    self._waiting.append((step, values))
    try:
      self._write(self._file)
    except OSError as error:
      if not self._is_failing:
        log.warning("%s: %s; metrics wait in memory", self._path, error)
      self._is_failing = True

  def _write(self, file: Any) -> None:
    while self._unwritten:
      self._unwritten = self._unwritten[file.write(self._unwritten) :]
    # A process that is killed loses no complete line.
    file.flush()
    if self._is_failing:
      self._is_failing = False
      log.warning("%s can be written again", self._path)
      # The thread of the old one has ended.
      self._tensorboard = self._open_tensorboard(self._waiting[0][0] - 1)
    for step, values in self._waiting:
      for name, value in values.items():
        self._tensorboard.add_scalar(name, value, step)
      if self._tracker is not None:
        self._tracker.write(step, values)
    self._waiting = []
    self._tb.update(_TB_SECONDS)

  def _open_tensorboard(self, start_step: int) -> Any:
    # It imports PyTorch wherever that is installed, which takes seconds.
    import tensorboardX

    return tensorboardX.SummaryWriter(
      self._tb.folder,
      purge_step=start_step + 1,
      # If its thread has met a full disk, a full queue would wait for ever.
      max_queue=0,
      # The default name has a resolution of a second; a quick restart must not
      # overwrite the file.
      filename_suffix=f".{os.getpid()}.{start_step}",
    )

  def close(self) -> None:
    if self._file is None:
      return
    if self._tracker is not None:
      self._tracker.close()
    try:
      self._buffer.close()
      self._tensorboard.close()
      self._tb.update()
    except OSError as error:
      log.warning("%s: %s; the last metrics are lost", self._path, error)


def _lines_up_to(path: pathlib.PurePath, step: int) -> Iterator[str]:
  for row in files.json_lines(path):
    if type(row.get("step")) is int and row["step"] <= step:
      yield json.dumps(row) + "\n"


def read(
  metrics: Mapping[str, Any], clock: Callable[[], float] = time.monotonic
) -> tuple[dict[str, float], float]:
  """Waits until a step is done.

  Called in a thread of its own, because the host waits elsewhere: for data, or
  in the call of a step, which on some devices returns only when it is done.

  Returns:
    The metrics of the step, and the time at which it was done.
  """
  values, done = jax.device_get(dict(metrics)), clock()
  return {name: float(value) for name, value in values.items()}, done


def device_memory() -> dict[str, float]:
  """The most memory that was in use on a device, in GiB; {} if unknown."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" not in stats:
    return {}
  return {"device_memory_gib": stats["peak_bytes_in_use"] / 2**30}


class Profile:
  """Writes an XProf trace of some steps to `WORKDIR/profile`.

  Args:
    workdir: the run's folder.
    steps: the first and the last step; () for none.
  """

  def __init__(self, workdir: str | os.PathLike, steps: Sequence[int]):
    self._trace = copies.Mirror(os.path.join(workdir, "profile"))
    self._first, self._last = steps or (0, 0)
    self._is_running = False

  def before(self, step: int) -> None:
    """Starts if a step is one of those."""
    if self._first <= step <= self._last and not self._is_running:
      jax.profiler.start_trace(self._trace.folder)
      self._is_running = True

  def ends_after(self, step: int) -> bool:
    return self._is_running and step >= self._last

  def stop(self) -> None:
    """Writes the trace, if there is one."""
    if self._is_running:
      self._is_running = False
      jax.profiler.stop_trace()
      self._trace.update()
      log.info("The trace of steps is in %s", self._trace.target)


class StepTimer:
  """The mean time of a step, without the pauses between steps.

  Times are seconds of any one clock.
  """

  def __init__(self, batch_size: int):
    self._batch_size = batch_size
    self._start: tuple[int, float] | None = None

  def restart(self, step: int, done: float) -> None:
    """Measures from here on: from the time when the step was done."""
    self._start = (step, done)

  def so_far(self, step: int, done: float) -> dict[str, float]:
    """Returns seconds per step and images per second since the (re)start.

    Args:
      step: number of a step.
      done: when the devices had completed it.
    """
    if self._start is None or done <= self._start[1]:
      return {}
    step_time = (done - self._start[1]) / (step - self._start[0])
    return {
      "step_time": step_time,
      "images_per_second": self._batch_size / step_time,
    }

  def leave_out(self, seconds: float) -> None:
    """Leaves out a pause since the (re)start, in which no step was running."""
    if self._start is not None:
      self._start = (self._start[0], self._start[1] + seconds)
