"""Rows that cannot be used: counted, listed, and bounded in number."""

import collections
import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

from absl import logging

# A web-scale set may have millions of dead rows; all are counted, but the
# memory that tells listed from unlisted is bounded.
_MAX_LISTED = 1_000_000
_MAX_LOGGED = 20


@dataclasses.dataclass(frozen=True)
class Bad:
  """Stands in the stream for a row that cannot be used."""

  id: str
  reason: str
  detail: str


class BadSamples:
  """Counts rows that cannot be used, lists them, and says when to give up.

  Args:
    path: a JSON Lines file that gets {"id", "reason", "detail"} once per id
      and reason, also across restarts; one file per process. None: rows are
      counted only.
    max_fraction: share of all rows read that may be bad.
    min_seen: rows to read before that share is judged.
  """

  def __init__(
    self,
    path: str | os.PathLike | None = None,
    max_fraction: float = 0.05,
    min_seen: int = 1000,
  ):
    if not 0 <= max_fraction < 1:
      raise ValueError(
        f"config.data.max_bad_fraction: expected a share in [0, 1), found "
        f"{max_fraction}. With 1 a run without any usable row would never end."
      )
    self.path = path
    self.seen = 0
    self.reasons: collections.Counter[str] = collections.Counter()
    self._max_fraction = max_fraction
    self._min_seen = min_seen
    self._listed: set[tuple[str, str]] = set()
    if path is not None and os.path.exists(path):
      self._listed.update(_resume_list(path))

  def count(self, row: Any) -> bool:
    """Take note of one row of the stream; return whether it is bad.

    Raises:
      ValueError: too many rows are bad.
    """
    self.seen += 1
    bad = isinstance(row, Bad)
    if bad:
      self.reasons[row.reason] += 1
      self.note(row)
    if self.seen >= self._min_seen:
      self.judge()
    return bad

  def note(self, bad: Bad) -> None:
    """Put a row on the list, if it is not there."""
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
      line = json.dumps(dataclasses.asdict(bad))
      with open(self.path, "a", encoding="utf-8") as file:
        file.write(line + "\n")

  def judge(self) -> None:
    """Raise `ValueError` if too many rows are bad."""
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
  """Why pictures cannot be used, by their ids; none are too many."""

  def __init__(self):
    super().__init__()
    self.of: dict[str, str] = {}

  def note(self, bad: Bad) -> None:
    self.of[bad.id] = f"{bad.reason}: {bad.detail}"

  def judge(self) -> None:
    pass


def _resume_list(path: str | os.PathLike) -> Iterator[tuple[str, str]]:
  """Read the list of an earlier run, which may have been cut in mid-line."""
  with open(path, "r+b") as file:
    content = file.read()
    whole = content.rfind(b"\n") + 1
    file.truncate(whole)
  for line in content[:whole].splitlines():
    row = json.loads(line)
    yield row["id"], row["reason"]
