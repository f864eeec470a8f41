"""How a command ends: a user's mistake is one message, a bug a traceback."""

import argparse
import functools
import os
import sys
import traceback
from collections.abc import Callable

from blip_jax.runtime import files

# Set to 1, it brings the traceback of every error back.
TRACEBACK = "BLIP_JAX_TRACEBACK"

# What this package and its readers of files raise for what a user can mend:
# values, files, missing extras, and a run that diverged.
_MISTAKES = (ValueError, OSError, ImportError, FloatingPointError)
# Nothing of a user's reaches these unchecked, so that their errors are bugs.
_ARRAY_LIBRARIES = {"flax", "jax", "jaxlib", "numpy", "optax"}


class UsageError(ValueError):
  """A command that cannot mean anything; its exit status is 2."""


def reports_errors(main: Callable[..., int | None]) -> Callable[..., int]:
  """Makes a function the entry point of a command; it returns the exit status.

  A user's mistake becomes `error: ...` on stderr and status 1, or 2 if the
  command itself is wrong. Any other exception passes through.

  If several processes take part, an error ends this one at once: at a normal
  exit it would wait for the others, which wait for it.
  """

  @functools.wraps(main)
  def command(*args, **kwargs) -> int:
    try:
      return main(*args, **kwargs) or 0
    except Exception as error:
      wanted = os.environ.get(TRACEBACK, "0") not in ("", "0")
      hidden = is_mistake(error) and not wanted
      if not hidden and not _has_peers():
        raise
      text = f"error: {message(error)}" if hidden else traceback.format_exc()
      print(text, file=sys.stderr, flush=True)
      status = 2 if isinstance(error, UsageError) else 1
      if _has_peers():
        sys.stdout.flush()
        os._exit(status)
      return status

  return command


def is_mistake(error: Exception) -> bool:
  """Whether an exception is about what a user gave, and not about the code."""
  if not isinstance(error, _MISTAKES):
    return False
  *_, (frame, _) = traceback.walk_tb(error.__traceback__)
  library = frame.f_globals.get("__name__", "").partition(".")[0]
  return library not in _ARRAY_LIBRARIES


def message(error: Exception) -> str:
  """What an exception says, without numbers of the operating system."""
  if isinstance(error, OSError) and error.filename and error.strerror:
    return f"{error.filename}: {error.strerror}"
  return str(error) or type(error).__name__


def local_path(text: str) -> str:
  """The type of paths for argparse: refuses gs:// and the like at once."""
  try:
    return str(files.local(text))
  except OSError as error:
    raise argparse.ArgumentTypeError(str(error)) from error


def _has_peers() -> bool:
  jax = sys.modules.get("jax")
  return jax is not None and jax.distributed.is_initialized()
