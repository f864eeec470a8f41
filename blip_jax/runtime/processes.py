"""Which process this is, which it works with, and whether another has ended.

A process leaves its identity in what it may leave behind: in locks, and in the
names of temporary files.  A number alone is not enough: another process may
have it by now, and every container counts from 1.
"""

import contextlib
import functools
import multiprocessing
import os
import pathlib
import signal
import socket
import sys
import threading
import zlib
from typing import Any, NamedTuple

import numpy as np

_BOOT = pathlib.Path("/proc/sys/kernel/random/boot_id")
# Seconds that a worker outlives a request to stop; its parent may need it.
_GRACE = 30.0
_NAMESPACE = pathlib.Path("/proc/self/ns/pid")


class Process(NamedTuple):
  """A process of one of the hosts that share a folder.

  Attributes:
    host: its name.
    machine: eight hexadecimal digits, equal where process ids mean the same:
      on one host between two boots, within one container.
    pid: its id there.
    started: when, in ticks since the boot; 0 where the system does not say.
  """

  host: str
  machine: str
  pid: int
  started: int

  def has_ended(self) -> bool:
    """Whether it certainly has; of another machine, nothing is certain."""
    if self.machine != _machine():
      return False
    now = _started(self.pid)
    return not _is_alive(self.pid) or 0 != now != self.started != 0

  def is_alive(self) -> bool:
    """Whether it certainly is."""
    return self.machine == _machine() and 0 != self.started == _started(
      self.pid
    )


def this() -> Process:
  """The process that asks."""
  pid = os.getpid()
  return Process(socket.gethostname(), _machine(), pid, _started(pid))


def from_json(content: Any) -> Process | None:
  """A process from what its `_asdict` became in a file; None if it is no such.

  One whose machine is not known is of this one if the host's name is equal.
  """
  if not isinstance(content, dict):
    return None
  host, pid = content.get("host"), content.get("pid")
  if not isinstance(host, str) or type(pid) is not int or pid <= 0:
    return None
  machine, started = content.get("machine"), content.get("started", 0)
  if not isinstance(machine, str):
    machine = _machine() if host == socket.gethostname() else ""
  return Process(host, machine, pid, started if type(started) is int else 0)


@functools.cache
def _machine() -> str:
  parts = [socket.gethostname()]
  with contextlib.suppress(OSError):  # where it is no Linux
    parts += [_BOOT.read_text().strip(), os.readlink(_NAMESPACE)]
  return f"{zlib.crc32(' '.join(parts).encode()):08x}"


def _started(pid: int) -> int:
  """0 where the system does not say; -1 of one that nobody waited for yet."""
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except (OSError, ValueError):
    return 0
  # The name, in brackets, may contain anything.
  fields = stat.rpartition(")")[2].split()
  return -1 if fields[0] in "ZX" else int(fields[19])


def _is_alive(pid: int) -> bool:
  try:
    os.kill(pid, 0)
  except (ProcessLookupError, OverflowError):
    return False
  except PermissionError:  # a process of another user
    return True
  return True


def has_peers() -> bool:
  """Whether other processes take part in this job, with their devices."""
  jax = sys.modules.get("jax")
  return jax is not None and jax.distributed.is_initialized()


def is_first() -> bool:
  """Whether it is this process that writes what all of a job write once."""
  return not has_peers() or sys.modules["jax"].process_index() == 0


def any_says(yes: bool) -> bool:
  """Whether any process of the job says yes; all of them must ask."""
  if not has_peers():
    return yes
  from jax.experimental import multihost_utils

  return bool(multihost_utils.process_allgather(np.array(yes)).any())


def begin_worker() -> None:
  """Ties this process, one of `multiprocessing`, to its parent.

  It ends when the parent does, even by SIGKILL, and leaves requests to stop,
  which terminals and schedulers send to all processes, to the parent.
  """
  parent = multiprocessing.parent_process()
  if parent is not None:

    def follow() -> None:
      parent.join()
      os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
  for number in (signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, _end_soon)


def _end_soon(*_: object) -> None:
  """What SIGTERM does: `multiprocessing` itself sends it too."""
  timer = threading.Timer(_GRACE, os._exit, (1,))
  timer.daemon = True
  timer.start()
