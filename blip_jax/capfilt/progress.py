"""How far a job is: a bar, and a line of the log for each work unit."""

import dataclasses
import json
import os
import pathlib
import socket
import time
from collections.abc import Mapping
from typing import Any

import tqdm

from blip_jax.capfilt import rows, work_units
from blip_jax.runtime import files, json_files
from blip_jax.runtime import progress as progress_lib


@dataclasses.dataclass(frozen=True)
class Opened:
  """A work unit that this process labels, and what is known of it so far.

  Attributes:
    work_unit: which.
    num_done: work units of the job that are done before it.
    before: its input when it was opened.
    num_images: that it has.
    counts: of the images that are labelled.
    text_rows: of these images.
  """

  work_unit: work_units.WorkUnit
  num_done: int
  before: work_units.Input
  num_images: int
  counts: rows.Counts
  text_rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)


_LOG = "log"
# What is read of a line of the log, as `json_files` writes types.
_LINE = {"work_unit": str, "images": range(2**53), "seconds": float}


def bar(num_work_units: int, shown: bool = True) -> tqdm.tqdm:
  """A bar of work units."""
  return progress_lib.bar(
    total=num_work_units,
    unit="work unit",
    bar_format="{percentage:3.0f}%|{bar:20}| {n:.1f}/{total} work units, "
    "{remaining} left{postfix}",
    disable=not shown,
  )


def in_words(
  images_per_second: float, texts: Mapping[str, Mapping[str, int]]
) -> str:
  """What stands behind the bar.

  Args:
    images_per_second: since the start.
    texts: source of texts -> their counts.
  """
  num_texts = sum(counts["in"] for counts in texts.values())
  num_kept = sum(counts["kept"] for counts in texts.values())
  share = num_kept / max(num_texts, 1)
  return f"{images_per_second:.1f} images/s, {share:.0%} of texts kept"


class Progress:
  """Shows a progress bar, and logs the finished work units of this process.

  The bar shows the done work units, images per second, the share of texts that
  are kept, and the time left. The log is `FOLDER/log/HOST-PID.jsonl`.

  Args:
    num_work_units: of the bar.
    folder: of the job.
    shown: whether there is a bar.
  """

  def __init__(
    self, num_work_units: int, folder: pathlib.PurePath, shown: bool = True
  ):
    self._bar = bar(num_work_units, shown)
    log_folder = folder / _LOG
    files.make_folder(log_folder)
    self._path = log_folder / f"{socket.gethostname()}-{os.getpid()}.jsonl"
    self._num_images = 0
    self._start = time.monotonic()
    self._unit: Opened | None = None

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_) -> None:
    self._bar.close()

  def show(self, unit: Opened) -> None:
    """Says whose images follow, if they are of another work unit."""
    if unit is self._unit:
      return
    self._unit = unit
    self._unit_start = time.monotonic()
    self._bar.n = unit.num_done
    self._bar.refresh()

  def add(self, num_images: int, counts: rows.Counts) -> None:
    """Shows that images of the current work unit were labelled.

    Args:
      num_images: since the last call.
      counts: of the work unit so far.
    """
    self._num_images += num_images
    speed = self._num_images / (time.monotonic() - self._start)
    self._bar.set_postfix_str(in_words(speed, counts.texts), refresh=False)
    assert self._unit is not None
    share = num_images / max(self._unit.num_images, 1)
    self._bar.update(min(share, self._bar.total - self._bar.n))

  def end(self, counts: rows.Counts, images_per_core: float) -> None:
    """Logs that the current work unit is done.

    Args:
      counts: of the work unit.
      images_per_core: read by this process so far, per second of processor
        time.
    """
    assert self._unit is not None
    seconds = time.monotonic() - self._unit_start
    line = {
      "work_unit": self._unit.work_unit.name,
      "images": counts.images["in"],
      "seconds": round(seconds, 3),
      "images_per_core": round(images_per_core, 1),
    }
    files.append_line(self._path, json.dumps(line))


def logged(folder: pathlib.PurePath) -> dict[str, tuple[int, int, float]]:
  """What each process has done so far, by its log.

  Args:
    folder: of the job.

  Returns:
    The process in words -> its work units, images and seconds. The line that
    a process was killed in is left out.
  """
  found = {}
  for name in files.list_folder(folder / _LOG):
    host, _, pid = name.removesuffix(".jsonl").rpartition("-")
    lines = [
      line
      for line in files.json_lines(folder / _LOG / name)
      if not json_files.problem(line, _LINE, complete=True)
    ]
    found[f"process {pid} on {host}"] = (
      len({line["work_unit"] for line in lines}),
      sum(line["images"] for line in lines),
      float(sum(line["seconds"] for line in lines)),
    )
  return found
