"""The state of a job: done work units and leases, as files in one folder.

Any number of processes, on hosts that share the folder, work on one job without
a server. A finished work unit has `NAME.parquet` and, written after it,
`NAME.done.json`. A work unit in progress has `.NAME.lease`, whose owner renews
its modification time. A lease that is not renewed may be taken over. Should two
processes ever label the same work unit, they write equal bytes to equal names.
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

from blip_jax.capfilt.work_units import WorkUnit
from blip_jax.runtime import files, resumable

log = logging.getLogger(__name__)

_JOB = "job.json"
_DONE = ".done.json"
_LEASE = ".lease"


class Ledger:
  """The folder of a job.

  Attributes:
    folder: its path.
    lease_seconds: age at which a lease may be taken over.
  """

  def __init__(self, folder: str | os.PathLike, lease_seconds: float = 300.0):
    self.folder = pathlib.Path(folder)
    self.lease_seconds = lease_seconds
    self._owner = {
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "id": uuid.uuid4().hex,
    }
    self._settings_at_start: dict[str, Any] | None = None

  @property
  def settings(self) -> dict[str, Any]:
    """Everything that decides what the job produces.

    Raises:
      ValueError: the folder holds no job.
    """
    settings = resumable.settings(self.folder / _JOB)
    if settings is None:
      raise ValueError(
        f"{self.folder}: no job was started there; expected {_JOB} in it. "
        "Set config.out to the folder of a job"
      )
    return settings

  def begin(self, settings: Mapping[str, Any], force: bool) -> None:
    """Starts the job, or joins it.

    Args:
      settings: everything that decides what the job produces.
      force: replaces other settings, so that all work units are done again.

    Raises:
      ValueError: the folder holds a job with other settings and `force` is
        False, or done-files without a job.
    """
    self._sweep()
    job = self.folder / _JOB
    if not files.exists(job) and any(
      name.endswith(_DONE) for name in files.list_folder(self.folder)
    ):
      raise ValueError(
        f"{self.folder}: holds work units of a job but no {_JOB}; set "
        "config.out to another folder"
      )
    self._settings_at_start = resumable.begin(
      job,
      settings,
      "Set config.out to another folder, or do all work units again with "
      "config.force=True",
      force,
    )

  def _sweep(self) -> None:
    """Deletes old temporary files of processes that were killed."""
    for name in files.list_folder(self.folder):
      if name.startswith(".") and name.endswith(".tmp"):
        path = self.folder / name
        with contextlib.suppress(FileNotFoundError):
          if self._age(path) > self.lease_seconds:
            files.remove(path)

  def rows_path(self, work_unit: WorkUnit) -> pathlib.Path:
    """The Parquet file of a work unit."""
    return self.folder / f"{work_unit.name}.parquet"

  def done_path(self, work_unit: WorkUnit) -> pathlib.Path:
    """The file that says that a work unit is done."""
    return self.folder / f"{work_unit.name}{_DONE}"

  def done(self, work_unit: WorkUnit) -> dict[str, Any] | None:
    """Returns the content of a done-file.

    None if there is none, or if settings, input or rows have changed since, so
    that the work unit has to be done again.
    """
    path = self.done_path(work_unit)
    try:
      done, since = files.read_json(path), files.stat(path).modified
    except FileNotFoundError:
      return None
    rows_path = self.rows_path(work_unit)
    is_current = (
      done["settings"] == digest(self.settings)
      and work_unit.unchanged(done["input"], since)
      and files.is_file(rows_path)
      and files.size(rows_path) == done["output"]["bytes"]
    )
    return done if is_current else None

  def finish(
    self, work_unit: WorkUnit, rows: bytes, report: Mapping[str, Any]
  ) -> None:
    """Writes the rows of a work unit, and then its done-file.

    Args:
      work_unit: which.
      rows: the Parquet file.
      report: what the done-file says, except settings and output.

    Raises:
      ValueError: another process has restarted the job with other settings.
    """
    if self.settings != self._settings_at_start:
      raise ValueError(
        f"{self.folder}: another process has restarted this job with other "
        f"settings; this process stops before it writes {work_unit.name}"
      )
    files.write_bytes(self.rows_path(work_unit), rows)
    output = {"bytes": len(rows), "sha256": hashlib.sha256(rows).hexdigest()}
    files.write_json(
      self.done_path(work_unit),
      {"settings": digest(self.settings), **report, "output": output},
    )

  def claims(
    self, work_units: Sequence[WorkUnit]
  ) -> Iterator[tuple[WorkUnit, int]]:
    """Yields work units to do, each with the number that are done so far.

    That number counts the work of all processes, as far as it is known. Each
    work unit is leased to this process until the next one is requested. Waits
    for other processes, and ends when all work units are done.
    """
    left, has_logged = list(work_units), False
    while True:
      left = [unit for unit in left if self.done(unit) is None]
      if not left:
        return
      num_done, has_claimed = len(work_units) - len(left), False
      for work_unit in left:
        with self._lease(work_unit) as is_leased:
          if is_leased and self.done(work_unit) is None:
            has_claimed = True
            yield work_unit, num_done
          # A lease that was free may also mean that another process is done.
          num_done += is_leased
      if not has_claimed:
        if not has_logged:
          log.info("Waiting for %d work units of other processes", len(left))
        has_logged = True
        time.sleep(min(1.0, self.lease_seconds / 5))

  def leased(self) -> dict[str, dict[str, Any]]:
    """Work unit -> its owner, and the age of the lease in `seconds`."""
    owners = {}
    for name in files.list_folder(self.folder):
      if not (name.startswith(".") and name.endswith(_LEASE)):
        continue
      path = self.folder / name
      with contextlib.suppress(FileNotFoundError, ValueError):
        owner, age = files.read_json(path), self._age(path)
        name = name.removeprefix(".").removesuffix(_LEASE)
        owners[name] = owner | {"seconds": round(age, 1)}
    return owners

  @contextlib.contextmanager
  def _lease(self, work_unit: WorkUnit) -> Iterator[bool]:
    """Holds a lease and renews it; yields whether it could be had."""
    path = self.folder / f".{work_unit.name}{_LEASE}"
    if not self._take(path):
      yield False
      return
    ended = threading.Event()

    def renew():
      while not ended.wait(self.lease_seconds / 5):
        with contextlib.suppress(FileNotFoundError):
          files.touch(path, create=False)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
      yield True
    finally:
      ended.set()
      thread.join()
      files.remove(path)

  def _take(self, path: pathlib.Path) -> bool:
    """Creates a lease, or takes over one whose owner is gone."""
    content = json.dumps(self._owner)
    if files.claim(path, content):
      return True
    try:
      if not self._is_abandoned(path):
        return False
      files.write_text(path, content)
      return files.read_json(path) == self._owner
    # It was released, or another process took it over.
    except (FileNotFoundError, ValueError):
      return False

  def _is_abandoned(self, path: pathlib.Path) -> bool:
    if self._age(path) > self.lease_seconds:
      return True
    try:
      owner = files.read_json(path)
    except ValueError:  # its owner is still writing it
      return False
    return owner["host"] == self._owner["host"] and not _is_alive(owner["pid"])

  def _age(self, path: pathlib.Path) -> float:
    """Seconds since a file was modified.

    By the clock of the file system, which all hosts share, unlike their own.
    """
    now = self.folder / f".{self._owner['id']}.now"
    files.touch(now)
    age = files.stat(now).modified - files.stat(path).modified
    files.remove(now)
    return age


def digest(settings: Mapping[str, Any]) -> str:
  """A short hash of settings."""
  text = json.dumps(settings, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:  # a process of another user
    return True
  return True
