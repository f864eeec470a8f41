"""Compiled programs on disk, so that a second start does not compile again.

JAX runs what it finds there, so the folder is the user's own, and nobody else
may write to it.
"""

import hashlib
import logging
import os
import platform

import jax

from blip_jax.runtime import copies, files

log = logging.getLogger(__name__)

# JAX reads it; a folder of the user's choice.
VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def enable() -> None:
  """Keeps compiled programs in the user's cache folder.

  A folder that VARIABLE names is used instead. If others could write to the
  folder, nothing is kept, and the log says so.
  """
  if os.environ.get(VARIABLE):
    return
  folder = copies.cache_folder() / _processor()
  try:
    files.make_private_folder(folder)
  except OSError as error:
    log.warning("Compiled programs are not kept: %s", error)
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))


def _processor() -> str:
  """A name of the kind of CPU: programs of another one may not run on it."""
  path, kinds = "/proc/cpuinfo", set()
  if files.exists(path):
    kinds = {
      line
      for line in files.read_text(path).splitlines()
      if line.startswith(("model name", "flags"))
    }
  text = "\n".join([platform.processor(), *sorted(kinds)])
  return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
