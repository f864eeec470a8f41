"""What runs in an actor of Ray: the models, and a thread that labels."""

import concurrent.futures
import logging
import os
import queue
import threading
from collections.abc import Generator
from typing import Any

import jax

from blip_jax.capfilt import progress as progress_lib
from blip_jax.capfilt import worker as worker_lib
from blip_jax.capfilt.engines.handout import Claim
from blip_jax.capfilt.work_units import Unusable, WorkUnit
from blip_jax.runtime import command, compilation_cache, files, host, processes
from blip_jax.runtime.config import Config

log = logging.getLogger(__name__)


class Actor:
  """A process of Ray that labels the work units that it is called with.

  Its methods run in threads: while it labels a work unit, it may be called with
  the next one, which it opens meanwhile.

  Args:
    config: of the job.
    folder: of its files.
    cwd: where relative paths begin.
    on_cpu: whether to leave accelerators alone.
    cores: that this process has.
  """

  def __init__(
    self, config: Config, folder: str, cwd: str, on_cpu: bool, cores: int
  ):
    logging.basicConfig(format="%(levelname)s %(message)s")
    logging.getLogger("blip_jax").setLevel(logging.INFO)
    host.keep_freed_memory()
    if on_cpu:
      jax.config.update("jax_platforms", "cpu")
    elif config.num_workers < 0:
      config.num_workers = cores
    try:
      os.chdir(cwd)
    except OSError as error:
      log.warning("Relative paths will not be found here: %s", error)
    self._config = config
    self._folder = files.as_path(folder)
    self._given = Given()
    self._begun: concurrent.futures.Future[None] = concurrent.futures.Future()
    threading.Thread(target=self._run, daemon=True).start()

  def begin(self) -> str:
    """Returns which process this is, once it has the models.

    Raises:
      ValueError: as `worker.started`.
    """
    self._begun.result()
    me = processes.this()
    return f"process {me.pid} on {me.host}"

  def label(self, work_unit: WorkUnit) -> dict[str, Any]:
    """Labels a work unit, and returns what its done-file says.

    Raises:
      Unusable: its input cannot be read, or keeps changing.
      ValueError: this process can label nothing any more.
    """
    self._begun.result()
    done = self._done(work_unit)
    if done is None:
      self._given.add(work_unit).result()
      done = self._done(work_unit)
    if done is None:
      raise Unusable("its files were changed as soon as they were written")
    return done

  def _run(self) -> None:
    try:
      if self._config.compilation_cache:
        compilation_cache.enable()
      with (
        worker_lib.started(self._config, self._folder, []) as worker,
        progress_lib.Progress(0, self._folder, shown=False) as progress,
      ):
        self._done = worker.ledger.done
        self._begun.set_result(None)
        worker.label_all(self._given, progress)
    except BaseException as error:
      # Not every exception can travel to another process.
      if isinstance(error, Exception) and command.is_mistake(error):
        error = ValueError(command.message(error))
      if not self._begun.done():
        self._begun.set_exception(error)
      self._given.fail(error)


class Given:
  """Hands out the work units that it is given, one after the other."""

  def __init__(self):
    self._queue: queue.SimpleQueue[WorkUnit] = queue.SimpleQueue()
    self._ends: dict[str, concurrent.futures.Future[None]] = {}
    self._held: set[str] = set()
    self._failed: BaseException | None = None
    self._lock = threading.Lock()

  def add(self, work_unit: WorkUnit) -> concurrent.futures.Future[None]:
    """Returns what is done when the work unit is, or has its error."""
    end = concurrent.futures.Future()
    with self._lock:
      if self._failed is not None:
        end.set_exception(self._failed)
        return end
      if (before := self._ends.get(work_unit.name)) is not None:
        return before  # of a call whose answer was lost
      self._ends[work_unit.name] = end
    self._queue.put(work_unit)
    return end

  def fail(self, error: BaseException) -> None:
    """Ends all work units, and those that will be given, with an error."""
    with self._lock:
      self._failed = error
      for end in self._ends.values():
        end.set_exception(error)
      self._ends.clear()

  def claims(self) -> Generator[Claim, None, None]:
    """Never ends; waits where nothing is given, and nothing held."""
    while True:
      try:
        work_unit = self._queue.get(block=not self._held)
      except queue.Empty:
        yield None
        continue
      self._held.add(work_unit.name)
      yield work_unit, 0

  def end(self, work_unit: WorkUnit, error: Unusable | None = None) -> None:
    self._held.discard(work_unit.name)
    with self._lock:
      end = self._ends.pop(work_unit.name)
    if error is None:
      end.set_result(None)
    else:
      end.set_exception(error)

  def progress(self) -> None:
    """Nobody waits for this process: Ray knows whether it is there."""
