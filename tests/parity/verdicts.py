"""The record of what was compared: how far ours is, and the table of it."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

OK, FAIL, MISSING = "ok", "FAIL", "missing"


@dataclasses.dataclass(frozen=True)
class Check:
  """A line of the table: how far a quantity of ours is from theirs.

  Attributes:
    case: of which it is.
    quantity: an array, or a group of them, by its worst.
    verdict: OK, FAIL or MISSING.
    absolute: largest difference.
    relative: the same in units of the array's scale.
    tolerance: of `relative`.
    note: which of a group is the worst, or what went wrong.
  """

  case: str
  quantity: str
  verdict: str
  absolute: float = np.nan
  relative: float = np.nan
  tolerance: float = np.nan
  note: str = ""


class Error(NamedTuple):
  absolute: float
  relative: float
  note: str = ""


def table(checks: Iterable[Check]) -> Iterator[str]:
  """Yields a line for each check, and how many there are of each verdict."""
  checks = list(checks)
  case = max([len(check.case) for check in checks], default=0) + 2
  wide = max([len(check.quantity) for check in checks], default=0) + 2
  yield (
    f"{'case':<{case}}{'quantity':<{wide}}{'max abs':>9}{'max rel':>9}"
    f"{'tolerance':>11}  verdict"
  )
  for c in checks:
    numbers = f"{_number(c.absolute):>9}{_number(c.relative):>9}"
    line = (
      f"{c.case:<{case}}{c.quantity:<{wide}}{numbers}"
      f"{_number(c.tolerance):>11}  {c.verdict:<9}"
      f"{c.note if c.verdict == FAIL else c.note[:80]}"
    )
    yield line.rstrip()
  counts = [
    f"{sum(c.verdict == verdict for c in checks)} {verdict}"
    for verdict in (OK, FAIL, MISSING)
  ]
  yield ", ".join(counts)


def _number(x: float) -> str:
  return "" if np.isnan(x) else f"{x:.1e}" if x else "0"


def difference(ours: Any, theirs: Any, scale: Any = None) -> Error:
  """How far an array of ours is from theirs; see `Golden.compare`."""
  ours, theirs = np.asarray(ours), np.asarray(theirs, np.float64)
  if ours.shape != theirs.shape:
    note = f"{list(ours.shape)} for {list(theirs.shape)}"
    return Error(np.inf, np.inf, note)
  if not theirs.size:
    return Error(0.0, 0.0)
  if scale is None:
    scale = np.abs(theirs).max() or 1.0
  elif callable(scale):
    scale = scale(theirs)
  difference = np.abs(ours.astype(np.float64) - theirs)
  return Error(difference.max(), (difference / scale).max())
