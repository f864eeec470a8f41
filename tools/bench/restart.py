"""Measures what checkpoints cost a training, and how long a restart takes.

  python -m blip_jax.tools.bench.restart
  python -m blip_jax.tools.bench.restart --seconds 300 --config mine.py \
    --config.batch_size=256

A training is started as a user starts it, stopped by SIGTERM, and started
again, now with its compiled programs in the cache. What is not for this tool is
for the training. Everything is written to a temporary folder.

Prints, of both starts, the seconds from the command to the end of the first
step; and the share of the time of steps for which they waited for checkpoints
that were written in the background, from the first step to SIGTERM
(`--seconds`, 150 by default).
"""

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from blip_jax.runtime import command, files

# Seconds for which a training may start and compile.
_PATIENCE = 1800.0


class Life(NamedTuple):
  """One process of a training.

  Attributes:
    first_step: seconds until its first step was done.
    rows: of its metrics.
  """

  first_step: float
  rows: list[dict[str, Any]]


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--seconds", type=float, default=150.0)
  args, flags = parser.parse_known_args(argv)
  if not any(flag.partition("=")[0] == "--config" for flag in flags):
    # So long that it does not end before it is stopped.
    flags = ["--config=quickstart", "--config.num_steps=100_000", *flags]
  with files.temporary_folder() as folder:
    first = live(folder, flags, args.seconds)
    again = live(folder, flags, 0.0)
  print(f"first step, empty cache: {first.first_step:.1f} s after the command")
  print(f"first step, warm cache: {again.first_step:.1f} s after the command")
  count, stall, share = stalls(first.rows)
  print(f"{count} checkpoints: {stall * 1e3:.0f} ms each, {share:.2%} of steps")
  return 0


def live(folder: pathlib.Path, flags: Sequence[str], seconds: float) -> Life:
  """Starts a training, or resumes it, and stops it.

  Args:
    folder: of its workdir and its cache.
    flags: of its command.
    seconds: between its first step and the request to stop.

  Raises:
    ValueError: it ends otherwise.
  """
  begin = time.monotonic()
  log = folder / "log"
  with open(log, "wb") as file:
    process = subprocess.Popen(
      [
        *(sys.executable, "-m", "blip_jax.main"),
        *(*flags, f"--workdir={folder / 'run'}", "--config.log_every_steps=1"),
      ],
      env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")},
      stderr=file,
    )
  before = len(_rows(folder))
  while len(_rows(folder)) <= before and process.poll() is None:
    if time.monotonic() > begin + _PATIENCE:
      process.kill()
    time.sleep(0.05)
  first_step = time.monotonic() - begin
  if process.poll() is None:
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
  if process.wait() != command.AGAIN:
    raise ValueError(f"the training ended by itself: {log.read_text()[-2000:]}")
  return Life(first_step, _rows(folder)[before:])


def _rows(folder: pathlib.Path) -> list[dict[str, Any]]:
  """What the training has written about steps and checkpoints."""
  path = folder / "run" / "metrics.jsonl"
  if not path.exists():
    return []
  names = {"train/loss", "train/save_seconds"}
  return [row for row in files.json_lines(path) if names & row.keys()]


def stalls(rows: Sequence[dict[str, Any]]) -> tuple[int, float, float]:
  """How long steps waited for checkpoints written in the background.

  Args:
    rows: of one process, the last of which is the checkpoint of its end.

  Returns:
    The number of checkpoints, the mean seconds, and their share of the time of
    all steps but the first.
  """
  waits = [r["train/save_seconds"] for r in rows if "train/save_seconds" in r]
  waits = waits[:-1]
  steps = [r["train/step_time"] for r in rows if "train/step_time" in r]
  if not waits or not steps:
    raise ValueError("--seconds: too short for a checkpoint in the background")
  return len(waits), sum(waits) / len(waits), sum(waits) / sum(steps)


if __name__ == "__main__":
  sys.exit(main())
