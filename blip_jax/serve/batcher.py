"""Requests that wait, gathered into batches of one program each.

No library is used here, for none has all that a public service of compiled
programs needs: LitServe computes what clients who went away asked for, and one
error of a batch is everybody's; `ray.serve.batch` and Gradio's `batch=True` mix
whatever arrives, while a program takes rows with the same options only; and
none of them bounds its queue in rows.
"""

import asyncio
import concurrent.futures
import dataclasses
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol, runtime_checkable

log = logging.getLogger(__name__)


@runtime_checkable
class Program(Hashable, Protocol):
  """What rows of one batch have in common; equal ones may share a batch.

  Attributes:
    name: for metrics.
    most: rows of the largest batch.
  """

  @property
  def name(self) -> str: ...

  @property
  def most(self) -> int: ...

  def __call__(self, rows: Sequence[Any], /) -> list[Any]:
    """Returns a result for each row."""
    ...


# A row, and what computes it.
Work = tuple[Program, Any]
# (name of a program, rows of a batch, seconds that it took).
Observe = Callable[[str, int, float], None]


class Full(Exception):
  """There is no room for further rows."""


@dataclasses.dataclass(eq=False)
class _Job:
  program: Program
  row: Any
  arrived: float
  result: asyncio.Future


class Batcher:
  """Computes rows in batches, one at a time, the longest waiting ones first.

  Its methods are for the thread of the event loop.

  Args:
    room: rows that may wait or be under computation.
    patience: seconds that a row waits for others, while the device is idle.
    observe: is told of each batch.
  """

  def __init__(self, room: int, patience: float, observe: Observe):
    self._room, self._patience, self._observe = room, patience, observe
    self._waiting: list[_Job] = []
    self._running = 0
    self._arrival = asyncio.Event()
    # A thread of its own, so that the event loop never waits for a device.
    self._device = concurrent.futures.ThreadPoolExecutor(1, "device")

  @property
  def rows(self) -> int:
    """Rows that wait or are under computation."""
    return len(self._waiting) + self._running

  def submit(self, work: Sequence[Work]) -> list[asyncio.Future]:
    """Takes rows, and returns a future of each.

    A row whose future is cancelled leaves at once, unless it is under
    computation.

    Raises:
      Full: there is no room for all of them; none is taken.
    """
    if self.rows + len(work) > self._room:
      raise Full(f"{self.rows} rows wait or are under computation")
    loop = asyncio.get_running_loop()
    now = loop.time()
    jobs = [_Job(*one, now, loop.create_future()) for one in work]
    for job in jobs:
      job.result.add_done_callback(lambda _, job=job: self._leave(job))
    self._waiting += jobs
    self._arrival.set()
    return [job.result for job in jobs]

  async def run(self) -> None:
    """Computes batches until it is cancelled."""
    while True:
      jobs = await self._gather()
      program, rows = jobs[0].program, [job.row for job in jobs]
      self._running = len(jobs)
      for job, result in zip(
        jobs, await self._compute(program, rows), strict=True
      ):
        if job.result.done():  # cancelled in the meantime
          continue
        if isinstance(result, Exception):
          job.result.set_exception(result)
        else:
          job.result.set_result(result)
      self._running = 0

  async def _gather(self) -> list[_Job]:
    """The longest waiting row, and others of its program."""
    loop = asyncio.get_running_loop()
    while True:
      self._arrival.clear()
      if not self._waiting:
        await self._arrival.wait()
        continue
      oldest = self._waiting[0]
      jobs = [job for job in self._waiting if job.program == oldest.program]
      jobs = jobs[: oldest.program.most]
      left = oldest.arrived + self._patience - loop.time()
      if len(jobs) == oldest.program.most or left <= 0:
        self._waiting = [job for job in self._waiting if job not in jobs]
        return jobs
      try:
        async with asyncio.timeout(left):
          await self._arrival.wait()
      except TimeoutError:
        pass  # then it goes without them

  async def _compute(self, program: Program, rows: list[Any]) -> list[Any]:
    """A result or an exception for each row."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    try:
      return await loop.run_in_executor(self._device, program, rows)
    except Exception as error:
      log.exception("A batch of %d rows of %s failed", len(rows), program.name)
      if len(rows) == 1:
        return [error]
    finally:
      self._observe(program.name, len(rows), loop.time() - start)
    # What is wrong with one of them must not cost the others.
    return [(await self._compute(program, [row]))[0] for row in rows]

  def _leave(self, job: _Job) -> None:
    if job in self._waiting:
      self._waiting.remove(job)
