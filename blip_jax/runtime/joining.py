"""Joins the processes of a job, so that the devices of all are one set."""

import json
import logging
import os
import re
import signal
import socket
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from blip_jax.runtime import compilation_cache, overrides, processes
from blip_jax.runtime.command import UsageError
from blip_jax.runtime.config import Config

log = logging.getLogger(__name__)

# How long the first process waits for the others, and they for it.
_JOIN_SECONDS = 300
# The others end when one process of a job has not been heard of for so long.
_PEER_SECONDS = 40
# Else, on CPUs, XLA starts the collectives of a program in orders that differ
# between processes, and Gloo joins those that do not belong together.
_SAME_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler"
# HOST:PORT,PROCESSES,INDEX; an IPv6 address is in brackets.
_ADDRESS = re.compile(
  r"([^\s:,/\[\]]+|\[[0-9a-fA-F:.]+\]):(\d{1,5}),(\d{1,6}),(\d{1,6})", re.ASCII
)
# How many tasks a scheduler started with one command. The first is of a step,
# the second also of a script that starts steps.
_TASKS = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def join(how: str) -> None:
  """Makes the devices of all processes visible as one set.

  Args:
    how: off, auto, or HOST:PORT,PROCESSES,INDEX.

  Raises:
    UsageError: there is no such way, or the processes cannot be found.
  """
  if how == "off":
    return
  address = {} if how == "auto" else _address(how)
  flags = os.environ.get("XLA_FLAGS", "")  # which XLA reads at its first use
  if _SAME_ORDER not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {_SAME_ORDER}=false".strip()
  if address.get("process_id"):
    _await_first(how, address["coordinator_address"])
  log.info("Waiting for all processes, for %d s at most", _JOIN_SECONDS)
  try:
    jax.distributed.initialize(
      **address,
      initialization_timeout=_JOIN_SECONDS,
      heartbeat_timeout_seconds=_PEER_SECONDS,
      shutdown_timeout_seconds=_PEER_SECONDS,
    )
  # Whatever the detection of a cluster meets in its environment.
  except Exception as error:
    raise UsageError(f"--distributed={how}: {error}") from error
  if jax.process_count() > 1 and jax.default_backend() == "cpu":
    compilation_cache.turn_off()
  # JAX aborts a process that has lost the others, and says so; the stacks of
  # all threads would hide it.
  signal.signal(signal.SIGABRT, signal.SIG_DFL)


def _address(how: str) -> dict[str, Any]:
  match = _ADDRESS.fullmatch(how)
  port, count, index = map(int, match.group(2, 3, 4)) if match else (0, 0, 0)
  if not match or not 0 < port < 2**16 or index >= count:
    raise UsageError(
      "--distributed: expected off, auto or HOST:PORT,PROCESSES,INDEX with an "
      "INDEX from 0 to PROCESSES - 1, such as localhost:9876,2,0, found "
      f"{how!r}"
    )
  try:
    socket.getaddrinfo(match[1].strip("[]"), port)
  except (OSError, UnicodeError) as error:
    raise UsageError(f"--distributed={how}: {match[1]}: {error}") from error
  return dict(
    coordinator_address=f"{match[1]}:{port}",
    num_processes=count,
    process_id=index,
  )


def _await_first(how: str, address: str) -> None:
  """Waits until process 0 listens: JAX would abort without naming it."""
  host, _, port = address.rpartition(":")
  deadline = time.monotonic() + _JOIN_SECONDS
  while True:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > deadline:
        raise UsageError(
          f"--distributed={how}: process 0 did not listen at {address} within "
          f"{_JOIN_SECONDS} s ({error}). Is it started, with index 0, and does "
          "the network let this host reach that port?"
        ) from error
      time.sleep(0.5)


def warn_if_apart(how: str) -> None:
  """Warns if a scheduler has started several tasks that do not join."""
  for name in _TASKS:
    tasks = os.environ.get(name, "")
    if tasks.isdecimal():
      if int(tasks) > 1 and how == "off":
        log.warning(
          "%s=%s: this command was started as several tasks, and each of them "
          "works alone. To make them one job, add --distributed=auto",
          name,
          tasks,
        )
      return


def check_same(config: Config, workdir: str) -> None:
  """Checks that all processes of a job were told the same.

  Raises:
    UsageError: in all of them, if not; says how one differs from the first.
  """
  if not processes.has_peers():
    return
  own = {"--workdir": workdir}
  own |= {f"--config.{key}": v for key, v in overrides.leaves(config).items()}
  told = _gather(json.dumps({key: repr(value) for key, value in own.items()}))
  first, *others = (json.loads(text) for text in told)
  for index, other in enumerate(others, start=1):
    lines = [
      f"  {key}: {first.get(key, 'absent')} in process 0, "
      f"{other.get(key, 'absent')} in process {index}"
      for key in {**first, **other}
      if first.get(key) != other.get(key)
    ]
    if lines:
      raise UsageError(
        "the processes of one job were started with different settings:\n"
        + "\n".join(lines)
      )


def _gather(text: str) -> list[str]:
  """The texts of all processes."""
  content = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(content)))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: len(content)] = content
  rows = multihost_utils.process_allgather(padded)
  return [
    row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)
  ]
