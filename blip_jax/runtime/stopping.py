"""Requests to stop: SIGTERM and SIGUSR1, as schedulers send them, and Ctrl-C.

Slurm sends SIGTERM when it takes a job's place away, and before the time of a
job is over the signal that `--signal` names, by custom SIGUSR1.

A command that is asked to stop leaves its files in order, and ends with a
status of its own.  A second Ctrl-C ends it at once; a second SIGTERM does not,
for schedulers may send it to a job and to each of its processes.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(BaseException):
  """A command stops because it was asked to.

  No error that a bad sample or a work unit may have caused, and so no
  `Exception`.
  """


def at_once(number: int) -> None:
  """What a signal does where nothing has to be finished first."""
  raise Stopped(f"{signal.Signals(number).name} was received")


def leave_if_asked() -> None:
  """Lets requests to stop end this process with the status for that.

  For the seconds in which jax is imported: nothing has begun, and an exception
  in the middle of an import would be an error. `handled_by` takes over.
  """
  for number in _SIGNALS:
    signal.signal(number, _leave)


def _leave(number: int, _: object) -> None:
  name = signal.Signals(number).name
  os.write(
    2, f"stopped: {name} was received; the same command resumes\n".encode()
  )
  os._exit(os.EX_TEMPFAIL)


@contextlib.contextmanager
def handled_by(
  handle: Callable[[int], None],
  *signals: signal.Signals,
) -> Iterator[None]:
  """Within it, the first request to stop calls a function.

  Only the main thread receives signals; elsewhere nothing changes.

  Args:
    handle: called with the number of the signal.
    *signals: SIGTERM, SIGUSR1 and SIGINT if none is given.
  """
  signals = signals or _SIGNALS
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def receive(number: int, _: object) -> None:
    for one in signals:
      again = signal.SIG_DFL if one == signal.SIGINT else signal.SIG_IGN
      signal.signal(one, again)
    handle(number)

  before = {number: signal.signal(number, receive) for number in signals}
  try:
    yield
  finally:
    for number, handler in before.items():
      # None: set by a library, which Python cannot set again.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
