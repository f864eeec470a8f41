"""How a command ends: a user's mistake is one message, a bug a traceback.

The statuses are listed in docs/scale.md.
"""

import argparse
import atexit
import functools
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable

from blip_jax.runtime import files, processes, stopping

# The command is not done, through no fault of its own: run it again.
AGAIN = os.EX_TEMPFAIL
# Set to 1, it brings the traceback of every error back.
TRACEBACK = "BLIP_JAX_TRACEBACK"

# What this package and its readers of files raise for what a user can mend:
# values, files, missing extras, and a run that diverged.
_MISTAKES = (ValueError, OSError, ImportError, FloatingPointError)
# Nothing of a user's reaches these unchecked, so that their errors are bugs.
_ARRAY_LIBRARIES = {"flax", "jax", "jaxlib", "numpy", "optax"}
# What JAX raises where another process of the job does not answer.
_LOST_PEER = re.compile(
  r"(?i)gloo|nccl|coordination|heartbeat|unavailable|connection (closed|reset)"
)


class UsageError(ValueError):
  """A command that cannot mean anything; its exit status is 2."""


def reports_errors(main: Callable[..., int | None]) -> Callable[..., int]:
  """Makes a function the entry point of a command; it returns the exit status.

  A user's mistake becomes `error: ...` on stderr and status 1, or 2 if the
  command itself is wrong. A request to stop becomes `stopped: ...` and `AGAIN`,
  and so does the end of another process of the job. Any other exception passes
  through.

  If several processes take part, an error ends this one at once: at a normal
  exit it would wait for the others, which wait for it.
  """

  @functools.wraps(main)
  def command(*args, **kwargs) -> int:
    try:
      with stopping.handled_by(stopping.at_once):
        return main(*args, **kwargs) or 0
    except stopping.Stopped as stop:
      text, status = f"stopped: {stop}; the same command resumes", AGAIN
      _leaves_with.append(status)
    except Exception as error:
      wanted = os.environ.get(TRACEBACK, "0") not in ("", "0")
      status = 2 if isinstance(error, UsageError) else 1
      if wanted or not (is_mistake(error) or _is_lost_peer(error)):
        if not processes.has_peers():
          raise
        text = traceback.format_exc()
      elif _is_lost_peer(error):
        text, status = f"error: {_lost(error)}", AGAIN
      else:
        text = f"error: {message(error)}"
    print(text, file=sys.stderr, flush=True)
    if processes.has_peers():
      sys.stdout.flush()
      os._exit(status)
    return status

  return command


# The status of a command that was stopped.
_leaves_with: list[int] = []


# Registered before a command begins, so that it comes after what the command
# registers, and before what libraries did when they were imported.
@atexit.register
def _leave() -> None:
  """Ends this process where Python would take apart what still is in use.

  Threads of XLA and of the input pipeline go on until they find that nobody
  waits for them; a step in the middle of it is a segmentation fault.
  """
  if _leaves_with:
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_leaves_with[0])


def is_mistake(error: Exception) -> bool:
  """Whether an exception is about what a user gave, and not about the code."""
  if not isinstance(error, _MISTAKES):
    return False
  return not _is_of_arrays(error)


def _is_of_arrays(error: BaseException) -> bool:
  return _library(error) in _ARRAY_LIBRARIES


def _library(error: BaseException) -> str:
  """The package that has raised an error."""
  frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
  name = frames[-1].f_globals.get("__name__", "") if frames else ""
  return name.partition(".")[0]


def _is_lost_peer(error: BaseException | None) -> bool:
  """Whether it, or an error during which it was raised, is about a peer."""
  if error is None or not processes.has_peers():
    return False
  if _is_of_arrays(error) and _LOST_PEER.search(str(error)):
    return True
  # Of Orbax, which waits for all processes to write their parts.
  if isinstance(error, TimeoutError) and _library(error) == "orbax":
    return True
  return _is_lost_peer(error.__context__)


def _lost(error: Exception) -> str:
  return (
    "another process of this job has ended, or cannot be reached; its own "
    "output says why. The same command on all hosts resumes. "
    f"({files.one_line(str(error)):.200})"
  )


def message(error: Exception) -> str:
  """What an exception says, without numbers of the operating system."""
  if isinstance(error, OSError) and error.filename and error.strerror:
    return f"{error.filename}: {error.strerror}"
  return str(error) or type(error).__name__


def local_path(text: str) -> str:
  """The type of paths for argparse: refuses gs:// and the like at once:
  tools work on files of this machine.
  """
  try:
    return str(files.local(text))
  except OSError as error:
    raise argparse.ArgumentTypeError(str(error)) from error
