"""The texts of a report as a table for spreadsheets, `report.csv`."""

import contextlib
import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from blip_jax.runtime import files

COLUMNS = ("key", "source", "text", "itm_prob", "kept", "reason", "image")
# Spreadsheets open about this many rows; the Parquet files have all.
MAX_ROWS = 1_000_000
# What a spreadsheet takes for the start of a formula, with the wide forms of
# East Asian keyboards. Texts of web pages could read other cells or files.
_FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")

Row = Mapping[str, Any]


@contextlib.contextmanager
def open_table(
  path: files.Path,
) -> Iterator[Callable[[Iterable[Row], Sequence[str]], None]]:
  """Yields `add(rows, reasons)`; the file appears once all were added.

  `rows` are those of a work unit, and `reasons` say why each is dropped, "" if
  it is kept. After `MAX_ROWS` texts, no more are written.

  Args:
    path: of the table.
  """
  with files.open_atomic(path) as file:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    num_left = MAX_ROWS

    def add(rows: Iterable[Row], reasons: Sequence[str]) -> None:
      nonlocal num_left
      for row, reason in zip(rows, reasons, strict=True):
        if not num_left:
          return
        num_left -= 1
        decided = {**row, "kept": not reason, "reason": reason}
        writer.writerow(_cell(decided[name]) for name in COLUMNS)

    yield add
    text.flush()
    text.detach()  # so that the file is still open when it gets its name


def _cell(value: Any) -> Any:
  """A value that no spreadsheet computes: texts that look like formulas get an
  apostrophe in front."""
  if isinstance(value, str) and value.lstrip().startswith(_FORMULA):
    return f"'{value}"
  return value
