"""Which units of a job are done, and who works on which: files in one folder.

Many processes, of any hosts that share the folder, work on one job without a
server. A unit that is done has `NAME.parquet` and then `NAME.done.json`; one
under way has `.NAME.lease`, whose owner keeps it young. A lease that has not
been renewed for a while may be taken over. Should two processes ever do the
same unit, they write the same bytes under the same name.
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from blip_jax.capfilt import work_units
from blip_jax.runtime import files, resumable

log = logging.getLogger(__name__)

_JOB = "job.json"
_DONE = ".done.json"
_LEASE = ".lease"


class Ledger:
  """The folder of a job.

  Attributes:
    folder: where it is.
    lease_seconds: how old a lease gets before another process takes it over.
  """

  def __init__(self, folder: str | os.PathLike, lease_seconds: float = 300.0):
    self.folder = pathlib.Path(folder)
    self.lease_seconds = lease_seconds
    self._owner = {
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "id": uuid.uuid4().hex,
    }
    self._began: dict[str, Any] | None = None

  @property
  def settings(self) -> dict[str, Any]:
    """What all units of the job were or will be made by.

    Raises:
      ValueError: the folder holds no job.
    """
    path = self.folder / _JOB
    if not path.exists():
      raise ValueError(
        f"{self.folder}: no job has been started there; expected {_JOB} in it. "
        "Name its folder with config.out"
      )
    return json.loads(path.read_text())

  def begin(self, settings: Mapping[str, Any], force: bool) -> None:
    """Starts the job, or joins it.

    Raises:
      ValueError: the folder has a job of other settings, and not `force`; or
        something else.
    """
    self._sweep()
    job = self.folder / _JOB
    if not files.exists(job) and any(
      name.endswith(_DONE) for name in files.list_folder(self.folder)
    ):
      raise ValueError(
        f"{self.folder}: has units of a job but no {_JOB}; name another "
        "folder with config.out"
      )
    self._began = resumable.begin(
      job,
      settings,
      "Name another folder with config.out, or do its units again with "
      "config.force=True",
      force,
    )

  def _sweep(self) -> None:
    """Deletes what processes that were killed left half-written."""
    for path in self.folder.glob(".*.tmp"):
      with contextlib.suppress(FileNotFoundError):
        if self._age(path) > self.lease_seconds:
          path.unlink()

  def rows_path(self, unit: work_units.WorkUnit) -> pathlib.Path:
    return self.folder / f"{unit.name}.parquet"

  def done(self, unit: work_units.WorkUnit) -> dict[str, Any] | None:
    """What is written of a unit that is done with the job's settings, from the
    input as it is now; None if there is something left to do."""
    path = self.folder / f"{unit.name}{_DONE}"
    try:
      found, since = json.loads(path.read_text()), path.stat().st_mtime
    except FileNotFoundError:
      return None
    whole = (
      found["settings"] == digest(self.settings)
      and unit.unchanged(found["input"], since)
      and self.rows_path(unit).is_file()
      and self.rows_path(unit).stat().st_size == found["output"]["bytes"]
    )
    return found if whole else None

  def finish(self, unit: work_units.WorkUnit, rows: bytes, told: dict) -> None:
    """Writes a unit's rows, and then that it is done.

    Raises:
      ValueError: another process has begun the job anew with other settings.
    """
    if self.settings != self._began:
      raise ValueError(
        f"{self.folder}: another process has begun this job anew, with other "
        f"settings; {unit.name} is left to it"
      )
    files.write_bytes(self.rows_path(unit), rows)
    output = {"bytes": len(rows), "sha256": hashlib.sha256(rows).hexdigest()}
    files.write_json(
      self.folder / f"{unit.name}{_DONE}",
      {"settings": digest(self.settings), **told, "output": output},
    )

  def claims(
    self, units: Sequence[work_units.WorkUnit]
  ) -> Iterator[tuple[work_units.WorkUnit, int]]:
    """Units to do now, and how many are done by whomever, as far as is known.

    Each is leased to this process until the next is asked for. Ends when all
    are done; waits while the last ones are with others.
    """
    left, told = list(units), False
    while True:
      left = [unit for unit in left if self.done(unit) is None]
      if not left:
        return
      number_done, claimed = len(units) - len(left), False
      for unit in left:
        with self._lease(unit) as own:
          if own and self.done(unit) is None:
            claimed = True
            yield unit, number_done
          # Another may have done it since.
          number_done += own
      if not claimed:
        if not told:
          log.info("Waiting for %d units that others work on", len(left))
        told = True
        time.sleep(min(1.0, self.lease_seconds / 5))

  def leased(self) -> dict[str, dict[str, Any]]:
    """Unit -> who works on it, and how many seconds ago that was said."""
    found = {}
    for path in sorted(self.folder.glob(f".*{_LEASE}")):
      with contextlib.suppress(FileNotFoundError, ValueError):
        owner, age = json.loads(path.read_text()), self._age(path)
        name = path.name.removeprefix(".").removesuffix(_LEASE)
        found[name] = owner | {"seconds": round(age, 1)}
    return found

  @contextlib.contextmanager
  def _lease(self, unit: work_units.WorkUnit) -> Iterator[bool]:
    path = self.folder / f".{unit.name}{_LEASE}"
    if not self._take(path):
      yield False
      return
    ended = threading.Event()

    def renew():
      while not ended.wait(self.lease_seconds / 5):
        with contextlib.suppress(FileNotFoundError):
          os.utime(path)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
      yield True
    finally:
      ended.set()
      thread.join()
      path.unlink(missing_ok=True)

  def _take(self, path: pathlib.Path) -> bool:
    """Makes the lease, or takes over one whose owner is gone."""
    content = json.dumps(self._owner)
    try:
      with open(path, "x") as file:
        file.write(content)
      return True
    except FileExistsError:
      pass
    try:
      if not self._abandoned(path):
        return False
      files.write_text(path, content)
      return json.loads(path.read_text()) == self._owner
    except (FileNotFoundError, ValueError):  # given up, or taken by another
      return False

  def _abandoned(self, path: pathlib.Path) -> bool:
    if self._age(path) > self.lease_seconds:
      return True
    try:
      owner = json.loads(path.read_text())
    except ValueError:  # being written
      return False
    return owner["host"] == self._owner["host"] and not _alive(owner["pid"])

  def _age(self, path: pathlib.Path) -> float:
    """In seconds by the clock of the file system, which all hosts share."""
    now = self.folder / f".{self._owner['id']}.now"
    now.touch()
    age = now.stat().st_mtime - path.stat().st_mtime
    now.unlink(missing_ok=True)
    return age


def digest(settings: Mapping[str, Any]) -> str:
  """A short name of settings."""
  text = json.dumps(settings, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # it is someone else's
    return True
  return True
