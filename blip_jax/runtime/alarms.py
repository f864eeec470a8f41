"""Alarms: of losses, and of runs that wait or stand still."""

import collections
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from blip_jax.runtime import files

# One third of the pairs are positives: a head that always predicts "no match"
# with probability 2/3 has this loss, the entropy of (1/3, 2/3).
ITM_COLLAPSED = math.log(3.0) - 2.0 / 3.0 * math.log(2.0)


def check_finite(
  workdir: str | os.PathLike,
  step: int,
  metrics: Mapping[str, Any],
  ids: Sequence[Any],
) -> None:
  """Stops a run at the first metric that is not finite, with the evidence.

  Writes `WORKDIR/nonfinite_<step>.json`: the metrics, and the ids of the rows
  of the batch. Each process writes its own rows; process i > 0 writes them to
  `nonfinite_<step>_process<i>.json`.

  Args:
    workdir: the run's folder.
    step: the step whose update was not made.
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
  path = files.as_path(workdir) / f"nonfinite_{step}{suffix}.json"
  files.write_json(path, {"step": step, "metrics": values, "ids": list(ids)})
  raise FloatingPointError(
    f"step {step}: {', '.join(bad)} not finite; the update was not made. The "
    f"batch is listed in {path}. The run continues from its last checkpoint; "
    f"try a lower config.optim.lr, or config.optim.clip=1"
  )


class StarvedAlarm:
  """Warns once when the devices wait for examples most of the time."""

  def __init__(self):
    self._warned = False

  def update(
    self, step: int, step_seconds: float, input_seconds: float
  ) -> bool:
    """Compares mean seconds of a step; returns whether it warns now."""
    if self._warned or input_seconds < 0.5 * step_seconds:
      return False
    self._warned = True
    logging.warning(
      "step %d: the devices wait for examples, %.3f of %.3f s a step. What may "
      "help: config.data.num_threads, config.data.num_workers, smaller images",
      step,
      input_seconds,
      step_seconds,
    )
    return True


class StallAlarm:
  """Warns when a run stands still, from a thread of its own.

  Once for each thing that does not end.

  Args:
    clock: in seconds.
    patience: seconds after which something stands still; or ten times what the
      longest so far took, if that is more.
  """

  def __init__(self, clock: Callable[[], float], patience: float = 300.0):
    self._clock = clock
    self._patience = patience
    self._longest = 0.0
    self._watched: tuple[str, float] | None = None
    self._closed = threading.Event()
    self._thread = threading.Thread(
      target=self._run, args=(patience / 10,), daemon=True
    )
    self._thread.start()

  def watch(self, what: str) -> None:
    """Something begins, such as "step 7 is running"; what was before ended."""
    self.rest()
    self._watched = what, self._clock()

  def rest(self) -> None:
    """What was watched has ended."""
    watched, self._watched = self._watched, None
    if watched is not None:
      self._longest = max(self._longest, self._clock() - watched[1])

  def check(self) -> bool:
    """Warns if something stands still; returns whether it did."""
    watched = self._watched
    if watched is None:
      return False
    seconds = self._clock() - watched[1]
    if seconds < max(self._patience, 10 * self._longest):
      return False
    self._watched = None
    logging.warning(
      "nothing has happened for %.0f seconds, since %s. `py-spy dump --pid %d` "
      "shows where; other processes of the job, or storage, may not answer",
      seconds,
      watched[0],
      os.getpid(),
    )
    return True

  def close(self) -> None:
    self._closed.set()

  def _run(self, seconds: float) -> None:
    while not self._closed.wait(seconds):
      self.check()


class CollapseAlarm:
  """Warns once when image-text matching has stopped learning.

  A head that always answers "no match" has a loss of H(1/3) = 0.6365. Users of
  the original met it when they trained on little or unusual data. Single losses
  scatter, and a healthy run passes through the value on its way down, so both
  halves of the window must average to within 0.01 of it.

  Args:
    window: number of losses to average over.
  """

  def __init__(self, window: int = 400):
    self._window = window
    self._losses: collections.deque[float] = collections.deque(maxlen=window)
    self._warned = False

  def update(self, step: int, loss_itm: float) -> bool:
    """Adds the loss of a step; returns whether it warns now."""
    self._losses.append(float(loss_itm))
    if self._warned or len(self._losses) < self._window:
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
