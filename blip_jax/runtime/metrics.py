"""Metrics of a run: files for programs and TensorBoard, and a progress line."""

import contextlib
import io
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import jax
import tensorboardX
import tqdm
from clu import parameter_overview

from blip_jax.runtime import files


def print_overview(params: Any, stream: io.TextIOBase | None = None) -> None:
  """Prints the parameters: names, shapes, types, sizes, mesh axes."""
  if jax.process_index() == 0:
    # Means and deviations would gather every weight to this host.
    table = parameter_overview.get_parameter_overview(
      params, include_stats="sharding"
    )
    print(table, file=sys.stderr if stream is None else stream)


class MetricWriter:
  """Writes metrics to `WORKDIR/metrics.jsonl` and, for TensorBoard, `tb/`.

  Only the first process writes. A run that resumes at `start_step` removes what
  the previous process wrote after it, so that no step appears twice.
  """

  def __init__(self, workdir: str | os.PathLike, start_step: int = 0):
    self._file: IO[str] | None = None
    if jax.process_index() != 0:
      return
    workdir = pathlib.Path(workdir)
    files.make_folder(workdir)
    path = workdir / "metrics.jsonl"
    if files.exists(path):
      files.write_text(path, "".join(_lines_up_to(path, start_step)))
    self._file = files.open_append(path)
    self._tensorboard = tensorboardX.SummaryWriter(
      str(workdir / "tb"),
      purge_step=start_step + 1,
      # The default name has a resolution of a second; a quick restart must not
      # overwrite the file.
      filename_suffix=f".{os.getpid()}.{start_step}",
    )

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Appends one line, `{"step": 50, "train/loss_itc": 3.1, ...}`."""
    if self._file is None:
      return
    metrics = {name: float(value) for name, value in metrics.items()}
    self._file.write(
      json.dumps(files.jsonable({"step": step, **metrics})) + "\n"
    )
    # A process that is killed loses no complete line.
    self._file.flush()
    for name, value in metrics.items():
      self._tensorboard.add_scalar(name, value, step)

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._tensorboard.close()


def _lines_up_to(path: pathlib.Path, step: int) -> Iterator[str]:
  # A killed process may leave half a line, only ever the last.
  for line in files.complete_lines(path):
    if json.loads(line)["step"] <= step:
      yield line.decode()


class StepTimer:
  """Measures the time of a step, without what happens between steps.

  Call `tick` when the host has read a step's metrics: only then the step is
  over. The first tick starts the clock, so that the first step, which compiles,
  is left out.
  """

  def __init__(
    self, batch_size: int, clock: Callable[[], float] = time.monotonic
  ):
    self._batch_size = batch_size
    self._clock = clock
    self._last: tuple[int, float] | None = None

  def tick(self, step: int) -> dict[str, float]:
    """Returns seconds per step and images per second since the last tick."""
    now, last = self._clock(), self._last
    self._last = (step, now)
    if last is None or step <= last[0] or now <= last[1]:
      return {}
    step_time = (now - last[1]) / (step - last[0])
    return {
      "step_time": step_time,
      "images_per_second": self._batch_size / step_time,
    }

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Leaves out what runs inside, such as evaluation or saving."""
    begin = self._clock()
    yield
    if self._last is not None:
      self._last = (self._last[0], self._last[1] + self._clock() - begin)


class Progress:
  """Shows a bar on a terminal, and plain lines anywhere else.

  A bar redraws itself with carriage returns, which would turn a log file into
  one unreadable line.
  """

  def __init__(
    self,
    num_steps: int,
    start_step: int = 0,
    stream: io.TextIOBase | None = None,
  ):
    self._num_steps = num_steps
    self._stream = sys.stderr if stream is None else stream
    self._quiet = jax.process_index() != 0
    self._bar = None
    if self._stream.isatty() and not self._quiet:
      # tqdm's own ETA would include the compilation, so it is replaced.
      self._bar = tqdm.tqdm(
        total=num_steps,
        initial=start_step,
        file=self._stream,
        dynamic_ncols=True,
        bar_format="{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt}{postfix}",
      )

  def update(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Shows a step and its metrics, without the prefix `train/`."""
    if self._quiet:
      return
    text = _status(step, self._num_steps, metrics)
    if self._bar is None:
      print(f"step {step}/{self._num_steps}  {text}", file=self._stream)
      self._stream.flush()
      return
    self._bar.n = step
    self._bar.set_postfix_str(text)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


def _status(step: int, num_steps: int, metrics: Mapping[str, Any]) -> str:
  values = {name.removeprefix("train/"): v for name, v in metrics.items()}
  step_time = values.pop("step_time", None)
  speed = values.pop("images_per_second", None)
  parts = [f"{name} {float(value):.4g}" for name, value in values.items()]
  if step_time is not None:
    eta = tqdm.tqdm.format_interval(step_time * (num_steps - step))
    parts.append(f"{1e3 * step_time:.0f} ms/step")
    parts.append(f"{speed:.1f} img/s")
    parts.append(f"eta {eta}")
  return "  ".join(parts)
