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
import sys
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


# The request of a `handled_by` that has not ended, if one was raised.
_raised: Stopped | None = None

# Seconds until a request that was swallowed is raised again.
_PATIENCE = 0.1


def raise_if_swallowed() -> None:
  """Raises a request to stop again, before its consequence is called damage.

  Orbax makes of any exception that arises inside it an error of its own, or
  None, even of what is no `Exception`.
  """
  if _raised is not None:
    raise _raised


def _insist(*_: object) -> None:
  """Raises the request again, unless it is what the main thread handles.

  Python ignores what is raised in a finaliser, and libraries catch all.
  """
  if _raised is not None and not _is_in_context(_raised, sys.exc_info()[1]):
    raise _raised


def fulfilled() -> None:
  """Says that what was asked for is done: the request is not raised again."""
  global _raised
  if _raised is not None:  # otherwise the timer is somebody else's
    signal.setitimer(signal.ITIMER_REAL, 0)
  _raised = None


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

  If that raises `Stopped` and it is swallowed, it is raised again, and an error
  meanwhile becomes `Stopped`; who catches it says `fulfilled`. Only the main
  thread receives signals; elsewhere nothing changes.

  Args:
    handle: called with the number of the signal.
    *signals: SIGTERM, SIGUSR1 and SIGINT if none is given.
  """
  signals = signals or _SIGNALS
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def receive(number: int, _: object) -> None:
    global _raised
    for one in signals:
      again = signal.SIG_DFL if one == signal.SIGINT else signal.SIG_IGN
      signal.signal(one, again)
    try:
      handle(number)
    except Stopped as stop:
      _raised = stop
      signal.signal(signal.SIGALRM, _insist)
      signal.setitimer(signal.ITIMER_REAL, _PATIENCE, _PATIENCE)
      raise

  before = {number: signal.signal(number, receive) for number in signals}
  before[signal.SIGALRM] = signal.getsignal(signal.SIGALRM)
  try:
    yield
  except Exception as error:
    # What is done in answer to the request has errors of its own.
    if _raised is not None and not _is_in_context(_raised, error):
      raise _raised from error
    raise
  finally:
    fulfilled()
    for number, handler in before.items():
      # None: set by a library, which Python cannot set again.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _is_in_context(request: Stopped, error: BaseException | None) -> bool:
  """Whether an error was raised while a request was handled."""
  while error is not None and error is not request:
    error = error.__context__
  return error is request
