"""The steps of a run on disk: which there are, and which one is used.

`WORKDIR/checkpoints/<step>/` has a folder for each item (see `saved_items.py`),
and `digests.json`, the digests of all files (see `digests.py`). It gets its
final name only when every process has written its part, so a folder whose name
is a number is complete.
"""

import logging
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from etils import epath

from blip_jax.runtime import digests, files, remote_steps, saved_items

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
# What `meta.json` says of the form of a step; one without it is of form 1.
FORMAT = 1
# The name of a step that gives way to another: see `best.py`.
REPLACED = ".replaced"

# Folders of steps that this process found to be damaged, and those without
# digests that it told of.
_damage_of: dict[str, digests.Damaged] = {}
_told: set[str] = set()


def find(path: str | os.PathLike) -> epath.Path:
  """Finds a checkpoint: the folder of a step, or the latest of a workdir.

  One in an object store is copied to this machine. A step of a workdir that is
  known to be damaged is passed over, loudly. Known are sizes of all files, the
  content of small ones, and what `remember` was told; see `find_sound` for the
  rest.

  Raises:
    ValueError: there is none, or none that is sound; says what was expected.
  """
  if files.is_remote(path):
    return _find_remote(files.as_path(path))
  path = epath.Path(files.local(path)).absolute()
  if _is_step(path):
    if not _is_usable(path):
      raise _damage_of[str(path)]
    return path
  root = path / FOLDER if (path / FOLDER).exists() else path
  found = [root / str(step) for step in sorted(steps(root), reverse=True)]
  # What a process that was killed between two renames left.
  found = found or sorted(root.glob(f"*{REPLACED}")) if root.is_dir() else []
  if not found:
    raise _no_checkpoint(path)
  return _first_usable(root, found)


def _find_remote(path: pathlib.PurePath) -> epath.Path:
  if digests.exists(path):
    folder = remote_steps.fetch(path)
    if not _is_usable(folder):
      raise _damage_of[str(folder)]
    return folder
  root = path / FOLDER if files.is_folder(path / FOLDER) else path
  found = sorted(remote_steps.numbers(root), reverse=True)
  if not found:
    raise _no_checkpoint(path)
  # Copied one by one, as they are asked for.
  folders = (remote_steps.fetch(root / str(step)) for step in found)
  return _first_usable(root, folders)


def _no_checkpoint(path: files.Path) -> ValueError:
  return ValueError(
    f"{path} holds no checkpoint: expected a run's workdir (with "
    f"{FOLDER}/<step>/ in it) or the folder of one step (with params/ in it)"
  )


def _first_usable(
  root: files.Path, folders: Iterable[epath.Path]
) -> epath.Path:
  found = []
  for folder in folders:
    if _is_usable(folder):
      return folder
    found.append(folder)
  reasons = "\n".join(f"  {_damage_of[str(folder)]}" for folder in found)
  raise ValueError(
    f"{root} holds no sound checkpoint:\n{reasons}\n"
    "Restore one of these folders from a copy; or move them away, and start "
    "again with another --workdir or from other weights"
  )


def find_sound(
  path: str | os.PathLike, items: Iterable[str] | None = None
) -> epath.Path:
  """Finds a checkpoint as `find` does, and reads the files of some items.

  Args:
    path: as of `find`.
    items: what has to be sound, such as "params"; by default everything.

  Raises:
    ValueError: as `find`.
  """
  items = None if items is None else tuple(items)
  while True:
    folder = find(path)
    try:
      digests.check(folder, items)
      return folder
    except digests.Damaged as damage:
      remember(damage)


def remember(damage: digests.Damaged) -> None:
  """Makes `find` pass over the folder of a step from now on.

  Raises:
    digests.Damaged: it is known already, so that nothing else can be used.
  """
  if damage.folder in _damage_of:
    raise damage
  _damage_of[damage.folder] = damage
  log.warning("%s. The newest sound step is used instead", damage)


def forget(folder: epath.Path) -> None:
  """Undoes `remember`, for a folder that was replaced or renamed."""
  _damage_of.pop(str(folder), None)


def damaged_in(root: epath.Path) -> list[epath.Path]:
  """The folders of steps that are known to be damaged."""
  folders = [root / str(step) for step in steps(root)]
  return [folder for folder in folders if str(folder) in _damage_of]


def _is_step(path: epath.Path) -> bool:
  return (path / "params").exists() or digests.exists(path)


def _is_usable(folder: epath.Path) -> bool:
  """Whether a step is not known to be damaged; tells of it the first time."""
  if str(folder) in _damage_of:
    return False
  lines = digests.damage(
    folder, lambda name: name.partition("/")[0] not in saved_items.ARRAYS
  )
  if not (folder / "params").exists():
    lines.append("params/ is missing")
  if lines:
    remember(digests.Damaged(folder, lines))
    return False
  _check_format(folder)
  if not digests.exists(folder) and str(folder) not in _told:
    _told.add(str(folder))
    log.info("%s has no %s, so it cannot be verified", folder, digests.NAME)
  return True


def meta(step: int, **more: Any) -> saved_items.JsonItem:
  """What a checkpoint says about itself."""
  return saved_items.JsonItem(
    "meta.json", {"format": FORMAT, "step": step, **more}
  )


def _check_format(folder: epath.Path) -> None:
  """Refuses a step whose form this version cannot know.

  An older step of the run is not used instead: that would undo its work.
  """
  path = folder / "meta" / "meta.json"
  found = files.read_json(path) if files.exists(path) else {}
  if found.get("format", 1) > FORMAT:
    raise ValueError(
      f"{folder} was saved by a newer version of blip_jax, in format "
      f"{found['format']}; this version reads formats up to {FORMAT}. Go on "
      "with the newer version"
    )


def steps(root: files.Path) -> list[int]:
  """The steps that a folder of checkpoints holds."""
  if files.is_remote(root):
    return remote_steps.numbers(root)
  if not files.is_folder(root):
    return []
  return [int(name) for name in files.list_folder(root) if name.isdecimal()]


def holds_one(path: str | os.PathLike) -> bool:
  """Whether there is a native checkpoint at a path, complete or not."""
  if files.is_remote(path):
    path = files.as_path(path)
    return digests.exists(path) or bool(
      remote_steps.numbers(path) or files.is_folder(path / FOLDER)
    )
  path = epath.Path(path)
  if _is_step(path) or (path / FOLDER).exists():
    return True
  named = [path / str(step) for step in steps(path)]
  return any(map(_is_step, named or path.glob(f"*{REPLACED}")))
