"""Who works here: one process at a time writes an output.

A lock is a small file, whose owner says in it who it is, and counts up as long
as it works.  A process that finds a lock watches it: if the count moves, the
owner works, and if it does not move for `patience` seconds, the owner is gone
and its lock is taken over.  Clocks of hosts and times of files are not asked.
Within one machine the end of a process is known at once.

An owner that was believed to be gone, and wakes up, finds that it has lost the
lock, and stops before it writes.
"""

import contextlib
import json
import logging
import math
import pathlib
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from blip_jax.runtime import files, processes

log = logging.getLogger(__name__)

# Seconds without a beat after which an owner on another machine is gone.
PATIENCE = 60.0
# Beats in that time.
_BEATS = 6


class Lock:
  """A lock on what a path names; see `hold`.

  Args:
    path: of the lock.
    patience: seconds without a beat after which its owner is gone.
    stuck_after: seconds after which an owner that reports no `progress` stops
      beating, so that others may go on in its place.
  """

  def __init__(
    self,
    path: files.Path,
    patience: float = PATIENCE,
    stuck_after: float = math.inf,
  ):
    self.path = files.as_path(path)
    self._patience = patience
    self._stuck_after = stuck_after
    self._content = processes.this()._asdict() | {
      "id": uuid.uuid4().hex,
      "since": time.strftime("%Y-%m-%d %H:%M:%S"),
      "beat": 0,
    }
    # Of another owner: its file as it was last seen to change, and when.
    self._seen: tuple[bytes, float] | None = None
    self._moves = False
    self._guard: Lock | None = None
    self._released = threading.Event()
    self._thread: threading.Thread | None = None

  def take(self) -> bool | None:
    """Takes the lock, if nobody has it or its owner is gone.

    Returns:
      Whether this process has it now; None if only more watching will tell
      whether its owner works: ask again, and soon.

    Raises:
      ValueError: what has the name of the lock is no file.
    """
    if not self._create():
      found = self._read()
      if found is None:  # just released
        return None
      if not self._is_abandoned(found):
        return False if self._moves else None
      if not self._take_over(found):  # another process was faster
        return None
    self._released.clear()
    self.progress()
    self._thread = threading.Thread(target=self._beat, daemon=True)
    self._thread.start()
    return True

  def release(self) -> None:
    """Gives the lock back, if this process has it."""
    if self._thread is not None:
      self._released.set()
      self._thread.join()
      self._thread = None
      if self._is_ours():
        files.remove(self.path)

  def progress(self) -> None:
    """Says that the owner is not stuck."""
    self._progress = time.monotonic()

  def check(self) -> None:
    """Call before what only the owner may do.

    Raises:
      ValueError: another process has taken the lock over.
    """
    if self._thread is not None and not self._is_ours():
      raise ValueError(
        f"{self.path}: this process has lost its lock: it stood still for "
        f"{self._patience:.0f} seconds or more, or somebody deleted the file. "
        f"{_who(owner(self.path))} works here now; this process stops"
      )

  def _create(self) -> bool:
    return files.claim(self.path, json.dumps(self._content))

  def _read(self) -> bytes | None:
    """What is in the lock; None if it is gone."""
    try:
      return files.read_bytes(self.path)
    except OSError as error:
      # A link to nothing can be neither created nor read, for ever.
      if not files.is_link(self.path) and isinstance(error, FileNotFoundError):
        return None
      if files.is_file(self.path):
        raise
      raise ValueError(
        f"{self.path}: expected a file, by which one process at a time works "
        f"here, found something else: {error.strerror}. Delete or rename it"
      ) from error

  def _is_ours(self) -> bool:
    return owner(self.path).get("id") == self._content["id"]

  def _is_abandoned(self, found: bytes) -> bool:
    process = processes.from_json(_parsed(found))
    if process is not None:
      if process.has_ended():
        return True
      if process.is_alive():
        self._moves = True
    now = time.monotonic()
    if self._seen is None or self._seen[0] != found:
      self._moves |= self._seen is not None
      self._seen = found, now
    return now - self._seen[1] > self._patience

  def _take_over(self, found: bytes) -> bool:
    """Puts this lock in the place of one that is as it was found.

    Another lock sees to it that one process at a time does so: it could remove
    the lock of a faster one otherwise.
    """
    if self._guard is None:
      self._guard = Lock(f"{self.path}+", self._patience)
    if not self._guard.take():
      return False
    try:
      with contextlib.suppress(FileNotFoundError):
        if files.read_bytes(self.path) == found:
          log.warning(
            "%s: %s is gone; taking over", self.path, _who(_parsed(found))
          )
          files.remove(self.path)
          return self._create()
      return False
    finally:
      self._guard.release()

  def _beat(self) -> None:
    seconds = self._patience / _BEATS
    while not self._released.wait(seconds):
      if time.monotonic() - self._progress > self._stuck_after:
        log.warning(
          "%s: nothing has happened for %.0f seconds; another process may "
          "take over",
          self.path,
          self._stuck_after,
        )
        return
      self._content["beat"] += 1
      # A file that others have replaced stays as it is.
      with contextlib.suppress(OSError):
        files.overwrite(
          self.path, self._content["id"], json.dumps(self._content)
        )


def owner(path: files.Path) -> dict[str, Any]:
  """What a lock says about its owner; empty if there is no lock."""
  try:
    return _parsed(files.read_bytes(path))
  except OSError:
    return {}


def who(path: files.Path) -> str:
  """The owner of a lock, in words."""
  content = owner(path)
  process = processes.from_json(content)
  ended = process is not None and process.has_ended()
  return _who(content) + (" which has ended" if ended else "")


def path_for(output: files.Path) -> pathlib.PurePath:
  """The path of the lock of an output that is a file."""
  output = files.as_path(output)
  return output.with_name(files.shortened(f".{output.name}.lock"))


@contextlib.contextmanager
def hold(path: files.Path, patience: float = PATIENCE) -> Iterator[Lock]:
  """Holds a lock, or says who does.

  Of a job of several processes, the first takes it for all.

  Args:
    path: of the lock; its folder is created.
    patience: seconds without a beat after which its owner is gone.

  Raises:
    ValueError: another process has it, or what has its name is no file; says
      which, and what to do.
  """
  lock = Lock(path, patience)
  problem = _take(lock) if processes.is_first() else ""
  if processes.any_says(bool(problem)):
    raise ValueError(problem or f"{path}: see the message of the first process")
  try:
    yield lock
  finally:
    lock.release()


def _take(lock: Lock) -> str:
  """Waits until it is known whether a lock can be had; returns why not."""
  files.make_folder(lock.path.parent)
  while True:
    taken = lock.take()
    if taken:
      return ""
    if taken is False:
      return (
        f"{lock.path.parent}: {_who(owner(lock.path))} works here; two "
        "processes would spoil each other's files. Wait until it is done, end "
        f"it, or name another folder. (Its lock is {lock.path.name}; when no "
        "such process is left, the next command takes it over by itself)"
      )
    time.sleep(min(1.0, lock._patience / 20))


def _parsed(content: bytes) -> dict[str, Any]:
  """Empty while its owner is still writing it, or if it is damaged."""
  try:
    parsed = json.loads(content)
  except (ValueError, RecursionError):
    return {}
  return parsed if isinstance(parsed, dict) else {}


def _who(content: dict[str, Any]) -> str:
  process = processes.from_json(content)
  if process is None:
    return "an unknown process"
  text = f"process {process.pid} on {files.one_line(process.host)}"
  since = content.get("since")
  return f"{text}, since {files.one_line(str(since))}," if since else text
