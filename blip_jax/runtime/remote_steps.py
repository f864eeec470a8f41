"""Steps of a run whose workdir is in an object store.

Orbax writes and reads a step on this machine's disk. It is copied to
`WORKDIR/checkpoints/<step>/` in the background, and the file of its digests
last: a step with digests is complete. To be read, it is copied back.
"""

import concurrent.futures
import functools
import hashlib
import logging
import uuid
from collections.abc import Callable

import jax
from etils import epath

from blip_jax.runtime import copies, digests, files

log = logging.getLogger(__name__)

# The folders that this process has copied to its disk -> where they come from.
_sources: dict[str, str] = {}


def refuse_peers(workdir: files.Path) -> None:
  """Raises `ValueError` if several processes would share the workdir.

  Each has a part of the arrays, and Orbax joins them in one folder.
  """
  if files.is_remote(workdir) and jax.process_count() > 1:
    raise ValueError(
      f"{workdir}: checkpoints of several processes need a folder that all of "
      "them share; mount the bucket (gcsfuse, Mountpoint for S3) or a shared "
      "disk, and give its path as --workdir. Data may stay in the object store"
    )


def numbers(root: files.Path) -> list[int]:
  """The complete steps of a folder in an object store."""
  root = files.as_path(root)
  return [step for step in _all(root) if digests.exists(root / str(step))]


def _all(root: files.Path) -> list[int]:
  return [int(n) for n in files.list_folder(root) if n.isdecimal()]


def fetch(folder: files.Path) -> epath.Path:
  """The folder of a step on this machine: a copy, until this process ends."""
  url = files.absolute(folder)
  return _fetched(url, files.stat(files.as_path(url) / digests.NAME))


@functools.cache
def _fetched(url: str, version: files.Stat) -> epath.Path:
  digest = hashlib.sha256(f"{url} {version}".encode()).hexdigest()[:16]
  # Deep enough that messages show the end of its address.
  tail = url.split("/")[-2:]
  target = epath.Path(copies.scratch_folder()) / digest
  target = target.joinpath(*tail)
  log.info("Copying %s to %s", url, target)
  copies.copy_folder(url, target, last=[digests.NAME])
  _sources[str(target)] = url
  return target


def source(folder: files.Path) -> str:
  """The address of a folder of `fetch`; any other folder as it is."""
  return _sources.get(str(folder), str(folder))


def new_folder() -> epath.Path:
  """An empty folder on this machine, for a step that is to be published."""
  return epath.Path(copies.scratch_folder()) / uuid.uuid4().hex


def publish(folder: files.Path, target: files.Path) -> None:
  """Copies a complete step to an object store; replaces one that is there."""
  target = files.as_path(target)
  files.remove(target / digests.NAME)  # not complete from now on
  files.remove_folder(target)
  copies.copy_folder(folder, target, last=[digests.NAME])


def remove_others(root: files.Path, kept: Callable[[int], object]) -> None:
  """Deletes steps, and what a process that was killed has left of one.

  Args:
    root: the folder of the steps.
    kept: whether a complete step stays.
  """
  root = files.as_path(root)
  complete = set(numbers(root))
  for step in _all(root):
    if step not in complete or not kept(step):
      files.remove(root / str(step) / digests.NAME)
      files.remove_folder(root / str(step))


class Published:
  """The steps of a run, which are published in the background, one at a time.

  Attributes:
    folder: on this machine, from which they come.

  Args:
    root: where they go to.
    keep: number of latest steps that are kept.
    keep_every_steps: steps at multiples of this are kept for ever; 0 for none.
  """

  def __init__(self, root: files.Path, keep: int, keep_every_steps: int):
    self._root, self._keep, self._every = root, keep, keep_every_steps
    self.folder = new_folder()
    self._threads = concurrent.futures.ThreadPoolExecutor(1, "publish")
    self._running: concurrent.futures.Future[None] | None = None

  def start(self, step: int, complete: Callable[[], None]) -> None:
    """Publishes a step; call `wait` before.

    Args:
      step: its number.
      complete: waits until the step is on the disk.
    """
    self._running = self._threads.submit(self._publish, step, complete)

  @property
  def is_busy(self) -> bool:
    """Whether a step is being published."""
    return self._running is not None and not self._running.done()

  def wait(self) -> None:
    """Waits until nothing is being published; raises what went wrong."""
    running, self._running = self._running, None
    if running is not None:
      running.result()

  def _publish(self, step: int, complete: Callable[[], None]) -> None:
    complete()
    root = files.as_path(self._root)
    publish(self.folder / str(step), root / str(step))
    latest = sorted(numbers(root))[-self._keep :]
    remove_others(
      root,
      lambda each: each in latest or (self._every and each % self._every == 0),
    )
