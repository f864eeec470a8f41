"""When a run saves: every so many steps, and every so many seconds."""

import math
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils


class Interval:
  """Tells at which steps a run saves; the same on all its processes.

  The first process has the clock. It looks at it at steps that all know, half
  of the way to the time at which it expects that something is due: so few
  steps wait for its answer, and steps that become slower delay nothing much.

  Args:
    every_steps: due at all multiples of it.
    every_seconds: due when so much time has passed since it last was; 0: never.
    first_step: number of steps done before.
    clock: in seconds.
  """

  def __init__(
    self,
    every_steps: int,
    every_seconds: float,
    first_step: int,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._every_steps = every_steps
    self._every_seconds = every_seconds
    self._clock = clock
    # When it last was: at first, the end of the first step, which compiles.
    self._last: tuple[int, float] | None = None
    self._look_at = first_step + 2

  def due(
    self, step: int, is_busy: Callable[[], bool], finish: Callable[[], None]
  ) -> bool:
    """Whether it is after a step; ask after every one, and in their order.

    Args:
      step: number of steps done, or dispatched.
      is_busy: whether the time has to wait for what was due before.
      finish: waits for the step. The answer of the first process is a program
        of all, and on a CPU such programs do not wait for each other.
    """
    now = self._clock()
    self._last = self._last or (step, now)
    is_due = step % self._every_steps == 0
    if not is_due and self._every_seconds > 0 and step >= self._look_at:
      wait = self._steps_to_wait(step, now, *self._last)
      wait = wait or int(is_busy())
      if jax.process_count() > 1:
        finish()
        wait = int(multihost_utils.broadcast_one_to_all(np.int32(wait)))
      is_due, self._look_at = wait == 0, step + wait
    if is_due:
      self._last, self._look_at = (step, now), step + 1
    return is_due

  def _steps_to_wait(
    self, step: int, now: float, first: int, begin: float
  ) -> int:
    rest = self._every_seconds - (now - begin)
    seconds = (now - begin) / (step - first)
    if rest <= 0:
      return 0
    # At most a million steps, if they take no time at all.
    return max(1, math.floor(min(0.5 * rest / max(seconds, 1e-9), 1e6)))
