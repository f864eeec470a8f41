"""The engine `local`: processes that share a folder lease its work units.

Any number of processes, on hosts that share the folder, work on one job without
a server. A work unit in progress has `.NAME.lease`, a lock; that of a process
that is gone, or stuck, is taken over. Should two processes ever label the same
work unit, they write equal bytes to equal names.
"""

import logging
import pathlib
import time
from collections.abc import Sequence

from blip_jax.capfilt import progress as progress_lib
from blip_jax.capfilt import worker as worker_lib
from blip_jax.capfilt.engines import handout
from blip_jax.capfilt.ledger import Ledger
from blip_jax.capfilt.work_units import WorkUnit
from blip_jax.runtime import files, lock
from blip_jax.runtime.config import Config

log = logging.getLogger(__name__)

_LEASE = ".lease"
# A lease is renewed until nothing was labelled for so many times its length.
_STUCK = 6


def run(
  config: Config, folder: pathlib.PurePath, work_units: Sequence[WorkUnit]
) -> Sequence[WorkUnit]:
  """Does what no other process does, until all of the job is done.

  Args:
    config: of the job.
    folder: of its files.
    work_units: all of them.

  Returns:
    The work units that are done now.
  """
  with worker_lib.started(config, folder, work_units) as worker:
    leased = Leased(work_units, worker.ledger, config.lease_seconds)
    with progress_lib.Progress(len(work_units), folder) as progress:
      worker.label_all(leased, progress)
  return work_units


class Leased(handout.Share):
  """Work units that any process of the job may do, each leased to one.

  Args:
    work_units: of the job.
    ledger: of the job, which has begun.
    lease_seconds: a lease that is not renewed for so long is taken over.
  """

  def __init__(
    self,
    work_units: Sequence[WorkUnit],
    ledger: Ledger,
    lease_seconds: float = 300.0,
  ):
    super().__init__(work_units, ledger)
    self._folder = ledger.folder
    self._seconds = lease_seconds
    # Work unit -> its lease, if this process has it, or watches it.
    self._leases: dict[str, lock.Lock] = {}
    self._watched: dict[str, lock.Lock] = {}
    self._has_logged = False

  def progress(self) -> None:
    for lease in [*self._leases.values()]:
      lease.progress()

  def _take(self, work_unit: WorkUnit) -> bool:
    name = work_unit.name
    if name not in self._watched:
      self._watched[name] = lock.Lock(
        self._folder / f".{name}{_LEASE}",
        self._seconds,
        _STUCK * self._seconds,
      )
    if not self._watched[name].take():
      return False
    self._leases[name] = self._watched.pop(name)
    return True

  def _give_back(self, name: str) -> None:
    super()._give_back(name)
    if lease := self._leases.pop(name, None):
      lease.release()

  def _wait(self, num_left: int) -> None:
    if not self._has_logged:
      log.info("Waiting for %d work units of other processes", num_left)
    self._has_logged = True
    time.sleep(min(1.0, self._seconds / 5))


def owners(folder: pathlib.PurePath) -> dict[str, str]:
  """Work unit -> who works on it, in words, as far as leases say it."""
  return {
    name.removeprefix(".").removesuffix(_LEASE): lock.who(folder / name)
    for name in files.list_folder(folder)
    if name.startswith(".") and name.endswith(_LEASE)
  }
