"""The state of a job: its settings and done work units, as files in one folder.

A finished work unit has `NAME.parquet` and, written after it, `NAME.done.json`.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from blip_jax.capfilt import work_units
from blip_jax.capfilt.work_units import WorkUnit
from blip_jax.data import rejects
from blip_jax.runtime import files, json_files, resumable

log = logging.getLogger(__name__)

_JOB = "job.json"
_DONE = ".done.json"
# So many work units are asked about one by one: a listing names all of a job's.
_FEW = 16
# What a done-file must have at least, as `json_files` writes types.
NUMBER = range(2**53)
_COUNTS = dict.fromkeys(("in", "kept", "dropped", "bad"), NUMBER)
_SHAPE = {
  "settings": str,
  "input": {"rows": object},
  "output": {"bytes": NUMBER, "sha256": str},
  "images": _COUNTS,
  "texts": {"web": _COUNTS, "synthetic": _COUNTS},
  "bad": {str: str},
  "damage": [str],
}
RESTORE = (
  "Run the command that started the job (config.job=capfilt) again: it writes "
  "the file again, and does again only what has other settings"
)
_REDO = (
  "Run the command that started the job (config.job=capfilt) again: it does "
  "this work unit again"
)


class Ledger:
  """The folder of a job.

  Attributes:
    folder: its path.
    damaged: work unit -> what is damaged in its files, as far as was read.
  """

  def __init__(self, folder: str | os.PathLike):
    self.folder = files.as_path(folder)
    self.damaged: dict[str, str] = {}
    self._settings_at_start: dict[str, Any] | None = None

  @property
  def settings(self) -> dict[str, Any]:
    """Everything that decides what the job produces.

    Raises:
      ValueError: the folder holds no job, or its file is damaged.
    """
    try:
      settings = resumable.settings(self.folder / _JOB)
    except files.DamagedFile as error:
      raise files.DamagedFile(error.path, error.problem, RESTORE) from error
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
    job = self.folder / _JOB
    self._replace_damaged(job, settings)
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

  def _replace_damaged(
    self, job: pathlib.PurePath, settings: Mapping[str, Any]
  ) -> None:
    """Writes damaged settings again, if all that is done has those of now."""
    try:
      resumable.settings(job)
    except files.DamagedFile as error:
      now = resumable.as_read(settings)
      for name in files.list_folder(self.folder):
        if name.endswith(_DONE):
          with contextlib.suppress(files.DamagedFile):
            if _read_done(self.folder / name)["settings"] != digest(now):
              return  # which `resumable.begin` refuses
      log.warning("%s. It is written again", error)
      files.write_json(job, now)

  def rows_path(self, work_unit: WorkUnit) -> pathlib.PurePath:
    """The Parquet file of a work unit."""
    return self.folder / f"{work_unit.name}.parquet"

  def done_path(self, work_unit: WorkUnit) -> pathlib.PurePath:
    """The file that says that a work unit is done."""
    return self.folder / f"{work_unit.name}{_DONE}"

  def done(self, work_unit: WorkUnit) -> dict[str, Any] | None:
    """Returns the content of a done-file.

    None if there is none, or if settings, input or rows have changed since, so
    that the work unit has to be done again. The first time, a process reads all
    of the rows to compare their hash.
    """
    return self._done(work_unit, lambda: digest(self.settings))

  def all_done(
    self, work_units: Sequence[WorkUnit]
  ) -> dict[str, dict[str, Any]]:
    """Name -> content of the done-file, of those that `done` has one of.

    Of many work units a listing says which may be done, so that an object store
    is not asked about each of the others.
    """
    if len(work_units) > _FEW:
      there = {*files.list_folder(self.folder)}
      work_units = [u for u in work_units if self.done_path(u).name in there]
    settings = functools.cache(lambda: digest(self.settings))
    found = {unit.name: self._done(unit, settings) for unit in work_units}
    return {name: done for name, done in found.items() if done is not None}

  def left(self, work_units: Sequence[WorkUnit]) -> list[WorkUnit]:
    """The work units that are not done, in order."""
    done = self.all_done(work_units)
    return [unit for unit in work_units if unit.name not in done]

  def _done(
    self, work_unit: WorkUnit, settings: Callable[[], str]
  ) -> dict[str, Any] | None:
    path, rows_path = self.done_path(work_unit), self.rows_path(work_unit)
    try:
      done = _read_done(path)
      if done["settings"] != settings() or not work_unit.unchanged(
        done["input"]
      ):
        return None
      _check_rows(rows_path, done["output"])
    except FileNotFoundError:
      return None
    except files.DamagedFile as error:
      self.note_damage(work_unit, error)
      return None
    return done

  def check_paths(self, work_unit: WorkUnit) -> None:
    """Raises `Unusable` if its files could not be written in the end."""
    try:
      refuse_folders(self.rows_path(work_unit), self.done_path(work_unit))
    except ValueError as error:
      raise work_units.Unusable(str(error)) from error

  def note_damage(self, work_unit: WorkUnit, error: ValueError) -> None:
    """Remembers that a file of a work unit is damaged, and logs it once."""
    if work_unit.name not in self.damaged:
      log.warning("%s", error)
    self.damaged[work_unit.name] = str(error)

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
    self.damaged.pop(work_unit.name, None)


def _check_rows(path: pathlib.PurePath, written: Mapping[str, Any]) -> None:
  """Raises `files.DamagedFile` if these are not the rows that were written."""
  num_bytes = files.size(path) if files.is_file(path) else 0
  if num_bytes != written["bytes"]:
    problem = f"expected {written['bytes']} bytes, found {num_bytes}"
  elif (found := work_units.sha256(path)) != written["sha256"]:
    problem = f"expected the SHA-256 {written['sha256']}, found {found}"
  else:
    return
  raise files.DamagedFile(path, problem, _REDO)


def refuse_folders(*paths: files.Path) -> None:
  """Raises `ValueError` if a folder is in the place of a file to be written."""
  for path in filter(files.is_folder, paths):
    raise ValueError(
      f"{path}: expected a file, or nothing; found a folder. Move it away"
    )


def digest(settings: Mapping[str, Any]) -> str:
  """A short hash of settings."""
  text = json.dumps(settings, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_done(path: pathlib.PurePath) -> dict[str, Any]:
  """Reads a done-file; raises `files.DamagedFile` if it lacks something."""
  try:
    done = files.read_json(path)
  except files.DamagedFile as error:
    raise files.DamagedFile(path, error.problem, _REDO) from error
  except FileNotFoundError:
    raise
  except OSError as error:
    if rejects.hits_all(error):
      raise
    problem = f"it cannot be read: {error.strerror}"
    raise files.DamagedFile(path, problem, _REDO) from error
  if problem := json_files.problem(done, _SHAPE, complete=True):
    raise files.DamagedFile(path, problem, _REDO)
  return done
