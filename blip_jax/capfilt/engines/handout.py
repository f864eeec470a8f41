"""Hands out work units to the process that labels them."""

import collections
import contextlib
import logging
from collections.abc import Generator, Iterator, Sequence
from typing import Protocol, runtime_checkable

from blip_jax.capfilt.ledger import Ledger
from blip_jax.capfilt.work_units import Unusable, WorkUnit

log = logging.getLogger(__name__)

# Of a work unit whose input cannot be read, or changes while it is labelled.
_MAX_TRIES = 3

# A work unit, and how many were done before it; None where all that is left is
# held: end everything before you ask for more.
Claim = tuple[WorkUnit, int] | None


@runtime_checkable
class Handout(Protocol):
  """Who hands out work units to this process."""

  def claims(self) -> Generator[Claim, None, None]:
    """Yields work units, which are held until `end` or the generator's."""
    ...

  def end(self, work_unit: WorkUnit, error: Unusable | None = None) -> None:
    """A work unit is done, or cannot be for now.

    Raises:
      ValueError: it is the last try.
    """
    ...

  def progress(self) -> None:
    """Says that this process is not stuck in what it has claimed."""
    ...


class Share:
  """Work units that are this process's own.

  Those that could not be done come again after all others.

  Args:
    work_units: all of them.
    ledger: of the job, which has begun.
  """

  def __init__(self, work_units: Sequence[WorkUnit], ledger: Ledger):
    self._work_units = work_units
    self._ledger = ledger
    self._tries = Tries()
    self._held: set[str] = set()

  def claims(self) -> Generator[Claim, None, None]:
    """Yields work units to do, each with the number that are done before it.

    That number counts the work of all processes, as far as it is known. Ends
    when all work units are done.
    """
    left = self._work_units
    with contextlib.closing(self):
      while left := self._ledger.left(left):
        if self._held:
          yield None
          continue
        num_done, has_claimed = len(self._work_units) - len(left), False
        for work_unit in left:
          if not self._take(work_unit):
            continue
          self._held.add(work_unit.name)
          if self._ledger.done(work_unit) is None:
            has_claimed = True
            yield work_unit, num_done
          else:  # by another process
            self._give_back(work_unit.name)
          num_done += 1
        if not has_claimed:
          self._wait(len(left))

  def end(self, work_unit: WorkUnit, error: Unusable | None = None) -> None:
    self._give_back(work_unit.name)
    self._tries.end(work_unit, error)

  def progress(self) -> None:
    """Nobody waits for this process."""

  def close(self) -> None:
    """Gives everything back."""
    for name in [*self._held]:
      self._give_back(name)

  def _take(self, work_unit: WorkUnit) -> bool:
    """Whether it is this process that does it."""
    del work_unit
    return True

  def _give_back(self, name: str) -> None:
    self._held.discard(name)

  def _wait(self, num_left: int) -> None:
    """Called where others have all that is left; here nobody does."""
    raise AssertionError(num_left)


class Tries:
  """Work units that could not be done, though others can."""

  def __init__(self):
    self._counts = collections.Counter()

  def end(self, work_unit: WorkUnit, error: Unusable | None) -> None:
    """A try is over; raises `ValueError` if it failed and was the last one."""
    name = work_unit.name
    if error is None:
      self._counts.pop(name, None)
      return
    self._counts[name] += 1
    log.warning("%s is not done: %s", name, error)
    if self._counts[name] == _MAX_TRIES:
      names = sorted(self._counts)
      raise ValueError(
        f"config.source: {len(names)} work units could not be done in "
        f"{_MAX_TRIES} tries, such as {names[:3]}; the others are. {error}. "
        "Run the same command again once that is mended"
      ) from error


@contextlib.contextmanager
def tried(handout: Handout, work_unit: WorkUnit) -> Iterator[None]:
  """Ends a work unit if what is done within it finds that it is unusable."""
  try:
    yield
  except Unusable as error:
    handout.end(work_unit, error)
