"""Compiled programs on disk, so that a second start does not compile again.

JAX runs what it finds there, so the folder is the user's own, and nobody else
may write to it.
"""

import hashlib
import logging
import os
import platform

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from blip_jax.runtime import copies, files

log = logging.getLogger(__name__)

# JAX reads it; a folder of the user's choice.
VARIABLE = "JAX_COMPILATION_CACHE_DIR"


# Of the programs that a plan has saved: file name -> SHA-256.
_SAVED = "saved.json"
# How the names of JAX's own files of programs end.
_PROGRAM = "-cache"


def enable() -> None:
  """Keeps compiled programs in the user's cache folder.

  A folder that VARIABLE names is used instead. If others could write to the
  folder, nothing is kept, and the log says so.

  Raises:
    ValueError: a program in the folder that VARIABLE names is not what a plan
      has saved there.
  """
  if os.environ.get(VARIABLE):
    _verify(os.environ[VARIABLE])
    return
  folder = copies.cache_folder() / _processor()
  try:
    files.make_private_folder(folder)
  except OSError as error:
    log.warning("Compiled programs are not kept: %s", error)
    return
  jax.config.update("jax_compilation_cache_dir", str(folder))


def turn_off() -> None:
  """Neither keeps compiled programs nor takes kept ones, for processes on CPUs.

  A program that XLA has not just compiled but loaded starts its collectives in
  orders that differ between processes, and Gloo ends them.
  """
  jax.config.update("jax_enable_compilation_cache", False)
  log.info("Compiled programs are not kept: several processes are on CPUs")


def save_in(folder: str | os.PathLike) -> None:
  """Keeps every program that is compiled from now on in a folder of the user.

  Raises:
    OSError: others could write to the folder.
  """
  files.make_private_folder(folder)
  jax_cache.reset_cache()  # which may be in use with another folder
  jax.config.update("jax_compilation_cache_dir", os.path.abspath(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def seal(folder: str | os.PathLike) -> list[str]:
  """Notes the hashes of all programs in a folder, for `enable`.

  Returns:
    The names of their files.
  """
  found = files.glob(os.path.join(folder, f"*{_PROGRAM}"))
  hashes = {os.path.basename(path): files.sha256(path) for path in found}
  files.write_json(os.path.join(folder, _SAVED), hashes)
  return sorted(hashes)


def _verify(folder: str) -> None:
  saved = os.path.join(folder, _SAVED)
  if not files.exists(saved):
    return
  hashes = files.read_json(saved)
  for name, expected in hashes.items():
    path = os.path.join(folder, name)
    found = files.sha256(path) if files.exists(path) else "no file"
    if found != expected:
      raise ValueError(
        f"{VARIABLE}: {path} is not the program that a plan has saved: "
        f"expected SHA-256 {expected}, found {found}; save it again, or unset "
        "the variable"
      )
  log.info("%d saved programs are in %s", len(hashes), folder)


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
