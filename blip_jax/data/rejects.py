"""Rows that cannot be used: counted, listed, and limited in number."""

import collections
import dataclasses
import errno
import json
from collections.abc import Iterator
from typing import Any

from absl import logging

from blip_jax.runtime import files

# A web-scale data set may have millions of unusable rows. All are counted, but
# the memory that tells which are listed already is bounded.
_MAX_LISTED = 1_000_000
_MAX_LOGGED = 20


class BadSample(Exception):
  """A sample that cannot be used; the loader counts and skips it.

  Attributes:
    reason: a short code, by which samples are counted. Images: missing,
      unreadable, empty, not_an_image, too_large, too_slow, truncated, corrupt,
      bad_array, unknown_range. Texts: invalid_utf8, empty_caption, too_long.
    detail: what exactly is wrong, for the report, in one line.
  """

  def __init__(self, reason: str, detail: str):
    # `Exception` gets both arguments so that the error can be pickled, to be
    # passed between processes.
    detail = files.one_line(detail)
    super().__init__(reason, detail)
    self.reason = reason
    self.detail = detail

  def __str__(self) -> str:
    return f"{self.reason}: {self.detail}"


# Besides an object store that does not answer: a full disk or quota, a disk
# that is read-only, too many open files.
_OF_ALL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE)


def hits_all(error: Exception) -> bool:
  """Whether an error would hit any other input as well, and must end a job.

  Any other exception while one row, image or shard is read costs only that.
  """
  if isinstance(error, files.Unavailable):
    return True
  return isinstance(error, OSError) and error.errno in _OF_ALL


@dataclasses.dataclass(frozen=True)
class Bad:
  """Takes the position of a row that cannot be used."""

  id: str
  reason: str
  detail: str


class BadSamples:
  """Counts and lists rows that cannot be used; fails if there are too many.

  Args:
    path: a JSON Lines file that gets {"id", "reason", "detail"} once per id
      and reason, also across restarts; one file per process. None: rows are
      only counted.
    max_fraction: fraction of all rows read that may be bad.
    min_seen: number of rows to read before that fraction is checked.

  Raises:
    ValueError: `max_fraction` is not in [0, 1).
  """

  def __init__(
    self,
    path: files.Path | None = None,
    max_fraction: float = 0.05,
    min_seen: int = 1000,
  ):
    if not 0 <= max_fraction < 1:
      raise ValueError(
        f"config.data.max_bad_fraction: expected a fraction in [0, 1), found "
        f"{max_fraction}. With 1 a run without any usable row would never end."
      )
    self.path = path
    self.seen = 0
    self.reasons: collections.Counter[str] = collections.Counter()
    self._max_fraction = max_fraction
    self._min_seen = min_seen
    self._listed: set[tuple[str, str]] = set()
    if path is not None and files.exists(path):
      self._listed.update(_resume_list(path))

  def count(self, row: Any) -> bool:
    """Counts one row that was read, and returns whether it is bad.

    Captions that a usable row has lost (`row.lost`) are only listed.

    Raises:
      ValueError: too many rows are bad.
    """
    self.seen += 1
    bad = isinstance(row, Bad)
    if bad:
      self.reasons[row.reason] += 1
      self.note(row)
    for lost in getattr(row, "lost", ()):
      self.note(lost)
    if self.seen >= self._min_seen:
      self.check()
    return bad

  def note(self, bad: Bad) -> None:
    """Adds a row to the list unless it is on it."""
    key = (bad.id, bad.reason)
    if key in self._listed or len(self._listed) >= _MAX_LISTED:
      return
    self._listed.add(key)
    logging.log_first_n(
      logging.WARNING,
      "Skipped %s: %s: %s",
      _MAX_LOGGED,
      bad.id,
      bad.reason,
      bad.detail,
    )
    if self.path is not None:
      try:
        files.append_line(self.path, json.dumps(dataclasses.asdict(bad)))
      except OSError as error:  # no reason to end a training
        logging.log_first_n(logging.WARNING, "%s: %s", 1, self.path, error)

  def check(self) -> None:
    """Raises `ValueError` if too many rows are bad."""
    total = self.reasons.total()
    if total <= self._max_fraction * self.seen:
      return
    counts = ", ".join(f"{k} {n}" for k, n in self.reasons.most_common())
    raise ValueError(
      f"{total} of {self.seen} rows read cannot be used "
      f"({total / self.seen:.1%}, allowed {self._max_fraction:.1%}): {counts}. "
      f"They are listed in {self.path}. If that is expected, raise "
      "config.data.max_bad_fraction; otherwise check the paths of the data."
    )


class Reasons(BadSamples):
  """Stores why images cannot be used, by their ids; never fails."""

  def __init__(self):
    super().__init__()
    self.by_id: dict[str, str] = {}

  def note(self, bad: Bad) -> None:
    self.by_id[bad.id] = f"{bad.reason}: {bad.detail}"

  def check(self) -> None:
    pass


def _resume_list(path: files.Path) -> Iterator[tuple[str, str]]:
  """Reads the list of an earlier run, whose last line may be incomplete."""
  files.drop_partial_line(path)
  for row in files.json_lines(path):
    id, reason = row.get("id"), row.get("reason")
    if isinstance(id, str) and isinstance(reason, str):
      yield id, reason
