"""What a run tells: metrics on disk, a line on the terminal, and alarms."""

import collections
import contextlib
import io
import json
import math
import os
import pathlib
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import jax
import tensorboardX
import tqdm
from absl import logging
from clu import parameter_overview

# A row is (positive, wrong image, wrong text): a head that always says "no
# match" with probability 2/3 has this loss, the entropy of (1/3, 2/3).
ITM_COLLAPSED = math.log(3.0) - 2.0 / 3.0 * math.log(2.0)


def write_json(path: str | os.PathLike, value: Any) -> None:
  """Writes JSON so that a reader finds all of it or none of it.

  Numbers that JSON lacks become the strings "NaN", "Infinity", "-Infinity".
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_text(path, json.dumps(_jsonable(value), indent=2) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a file so that a reader finds all of it or none of it."""
  write_bytes(path, text.encode())


def write_bytes(path: pathlib.Path, content: bytes) -> None:
  """Writes a file so that a reader finds all of it or none of it, even after
  the machine was switched off. What is there stays until all is written."""
  with whole_file(path) as file:
    file.write(content)


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[BinaryIO]:
  """A file that gets its name when it is written and on disk, or never."""
  # Processes of several hosts may write the same file.
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
  try:
    with open(temporary, "wb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _jsonable(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {str(key): _jsonable(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_jsonable(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    # float() of these gives the number back; null would lose which it was.
    if math.isnan(value):
      return "NaN"
    return "Infinity" if value > 0 else "-Infinity"
  return value


def print_overview(params: Any, stream: io.TextIOBase | None = None) -> None:
  """Prints the parameters once: names, shapes, types, sizes, mesh axes."""
  if jax.process_index() == 0:
    # Means and deviations would gather every weight to this host.
    table = parameter_overview.get_parameter_overview(
      params, include_stats="sharding"
    )
    print(table, file=sys.stderr if stream is None else stream)


class Writer:
  """Writes metrics to `WORKDIR/metrics.jsonl` and, for TensorBoard, `tb/`.

  Only the first process writes. A run that resumes at `start_step` takes back
  what the previous process wrote after it, so no step appears twice.
  """

  def __init__(self, workdir: str | os.PathLike, start_step: int = 0):
    self._file = self._tensorboard = None
    if jax.process_index() != 0:
      return
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "metrics.jsonl"
    if path.exists():
      write_text(path, "".join(_lines_up_to(path, start_step)))
    self._file = path.open("a")
    self._tensorboard = tensorboardX.SummaryWriter(
      str(workdir / "tb"),
      purge_step=start_step + 1,
      # A name tells only the second; a quick restart must not overwrite it.
      filename_suffix=f".{os.getpid()}.{start_step}",
    )

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Appends one line, `{"step": 50, "train/loss_itc": 3.1, ...}`."""
    if self._file is None:
      return
    metrics = {name: float(value) for name, value in metrics.items()}
    self._file.write(json.dumps(_jsonable({"step": step, **metrics})) + "\n")
    # A process that is killed loses no line that was written.
    self._file.flush()
    for name, value in metrics.items():
      self._tensorboard.add_scalar(name, value, step)

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._tensorboard.close()


def _lines_up_to(path: pathlib.Path, step: int) -> Iterator[str]:
  for line in path.read_text().splitlines(keepends=True):
    # A killed process may leave half a line, only ever the last.
    if not line.endswith("\n"):
      return
    if json.loads(line)["step"] <= step:
      yield line


class StepTimer:
  """Tells the time of a step, without what is not stepping.

  Call `tick` when the host has read a step's metrics, as only then the step is
  over. The first tick starts the clock, so the first step, which compiles, is
  left out.
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
    """Leaves out what runs inside: evaluation, waiting for a checkpoint."""
    begin = self._clock()
    yield
    if self._last is not None:
      self._last = (self._last[0], self._last[1] + self._clock() - begin)


class Progress:
  """Shows a bar on a terminal, and plain lines anywhere else.

  A bar redraws itself with carriage returns, which would turn a log file or a
  scheduler's console into one unreadable line.
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
      # Its own ETA would count the compilation, so ours stands in its place.
      self._bar = tqdm.tqdm(
        total=num_steps,
        initial=start_step,
        file=self._stream,
        dynamic_ncols=True,
        bar_format="{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt}{postfix}",
      )

  def update(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Shows a step, with its `train/` metrics under their short names."""
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


def check_finite(
  workdir: str | os.PathLike,
  step: int,
  metrics: Mapping[str, Any],
  ids: Sequence[Any],
) -> None:
  """Stops a run at the first metric that is no number, with the evidence.

  Writes `WORKDIR/nonfinite_<step>.json`: the metrics, and the ids of the rows
  of the batch. Each process writes its own rows, the others than the first
  under `nonfinite_<step>_process<i>.json`.

  Args:
    workdir: the run's folder.
    step: the step whose update would have been made.
    metrics: of that step, on the host.
    ids: of the rows of this process, as the data names them.

  Raises:
    FloatingPointError: names the step, the metrics and the file.
  """
  values = {name: float(value) for name, value in metrics.items()}
  bad = [name for name, value in values.items() if not math.isfinite(value)]
  if not bad:
    return
  process = jax.process_index()
  suffix = f"_process{process}" if process else ""
  path = pathlib.Path(workdir) / f"nonfinite_{step}{suffix}.json"
  write_json(path, {"step": step, "metrics": values, "ids": list(ids)})
  raise FloatingPointError(
    f"step {step}: {', '.join(bad)} not finite; the update was not made. The "
    f"batch is listed in {path}. The run continues from its last checkpoint; "
    f"try a lower config.optim.lr, or config.optim.clip=1"
  )


class CollapseAlarm:
  """Warns once when image-text matching has stopped learning.

  A head that always answers "no match" has a loss of H(1/3) = 0.6365: the
  sign that users of the original met when training on little or foreign data.
  Single losses scatter and a healthy run passes through the value on its way
  down, so both halves of the window must average to within 0.01 of it.

  Args:
    window: over how many losses.
  """

  def __init__(self, window: int = 400):
    self._losses = collections.deque(maxlen=window)
    self._warned = False

  def update(self, step: int, loss_itm: float) -> bool:
    """Takes the loss of a step; returns whether it warned now."""
    self._losses.append(float(loss_itm))
    if self._warned or len(self._losses) < self._losses.maxlen:
      return False
    losses, half = list(self._losses), len(self._losses) // 2
    means = [sum(losses[:half]) / half, sum(losses[-half:]) / half]
    self._warned = all(abs(mean - ITM_COLLAPSED) < 0.01 for mean in means)
    if self._warned:
      logging.warning(
        "step %d: loss_itm has stayed at %.4f, which is what a head that "
        "always answers 'no match' has. Image-text matching is not learning. "
        "What helped others: start from trained weights (config.init.weights), "
        "a lower config.optim.lr or a longer warm-up, more or cleaner pairs, "
        "pre-training without ITC first, for easier negatives "
        "(config.pretrain.loss_weights=(0.0,2.0,1.0)). "
        "It may still start once loss_itc has fallen well below its first "
        "value",
        step,
        means[1],
      )
    return self._warned
