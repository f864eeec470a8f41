"""A job that may be stopped and started again.

It keeps its settings next to what it produces. The same command resumes it;
another one, whose results would not belong together with what is there, is
refused.
"""

import json
from collections.abc import Mapping
from typing import Any

from blip_jax.runtime import files


def settings(path: files.Path) -> dict[str, Any] | None:
  """What a job was started with; None if none was.

  Raises:
    files.DamagedFile: it is no file, or no JSON object.
  """
  if not files.exists(path):
    return None
  if not files.is_file(path):
    problem = "expected a file, found a folder, a pipe or a device"
    raise files.DamagedFile(path, problem)
  content = files.read_json(path)
  if not isinstance(content, dict):
    raise files.DamagedFile(path, f"expected an object, found {content!r:.40}")
  return content


def as_read(settings_now: Mapping[str, Any]) -> dict[str, Any]:
  """Settings as they will be read from their file."""
  return json.loads(json.dumps(files.jsonable(settings_now)))


def refuse_others(
  path: files.Path,
  there: Mapping[str, Any],
  now: Mapping[str, Any],
  hint: str,
) -> None:
  """Raises `ValueError` if settings differ, with a line for each of these.

  Args:
    path: the file of the settings that are there.
    there: those of before.
    now: from `as_read`.
    hint: what to do about it; the end of the error.
  """
  lines = "".join(
    f"  {key}: {there.get(key)!r} there, {now.get(key)!r} now\n"
    for key in {**now, **there}
    if there.get(key) != now.get(key)
  )
  if lines:
    raise ValueError(
      f"{path}: this job was started with other settings:\n{lines}{hint}"
    )


def begin(
  path: files.Path,
  settings_now: Mapping[str, Any],
  hint: str,
  force: bool = False,
  write: bool = True,
) -> dict[str, Any]:
  """Starts a job, or resumes it.

  Args:
    path: the JSON file of its settings.
    settings_now: everything that decides what the job produces.
    hint: what to do about other settings, or lost ones; the end of the error.
    force: replaces other settings instead of refusing them.
    write: whether this process may write the file; one of several that work on
      the same job together does, and all of them refuse other settings.

  Returns:
    The settings as they will be read.

  Raises:
    ValueError: the job was started with other settings; lists them.
    files.DamagedFile: nobody knows what it was started with.
  """
  now = as_read(settings_now)
  try:
    there = settings(path)
  except files.DamagedFile as error:
    if not force:
      raise files.DamagedFile(path, error.problem, hint) from error
    there = {}
  if there == now:
    return now
  if there is not None and not force:
    refuse_others(path, there, now, hint)
  if write:
    files.write_json(path, now)
  return now
