"""The results of the comparisons, and the table that lists them."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

OK, FAIL, MISSING = "ok", "FAIL", "missing"


@dataclasses.dataclass(frozen=True)
class Check:
  """A line of the table: the difference between a quantity and its golden.

  Attributes:
    case: name of the case.
    quantity: name of an array, or of a group of arrays; the line then shows
      the array with the largest relative difference.
    verdict: OK, FAIL or MISSING.
    absolute: largest absolute difference.
    relative: largest difference in units of the array's scale.
    tolerance: upper limit of `relative`.
    note: which array of a group has the largest difference, or what failed.
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
  """Yields a line for each check, then the number of each verdict."""
  checks = list(checks)
  case = max([len(check.case) for check in checks], default=0) + 2
  width = max([len(check.quantity) for check in checks], default=0) + 2
  yield (
    f"{'case':<{case}}{'quantity':<{width}}{'max abs':>9}{'max rel':>9}"
    f"{'tolerance':>11}  verdict"
  )
  for c in checks:
    numbers = f"{_number(c.absolute):>9}{_number(c.relative):>9}"
    line = (
      f"{c.case:<{case}}{c.quantity:<{width}}{numbers}"
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


def difference(actual: Any, expected: Any, scale: Any = None) -> Error:
  """The largest difference of two arrays; `scale` as in `Golden.compare`."""
  actual, expected = np.asarray(actual), np.asarray(expected, np.float64)
  if actual.shape != expected.shape:
    note = f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    return Error(np.inf, np.inf, note)
  if not expected.size:
    return Error(0.0, 0.0)
  if scale is None:
    scale = np.abs(expected).max() or 1.0
  elif callable(scale):
    scale = scale(expected)
  difference = np.abs(actual.astype(np.float64) - expected)
  return Error(difference.max(), (difference / scale).max())
