"""The file of results: a row for each kind, size and device; as a table."""

import os
import pathlib
from collections.abc import Iterable
from typing import Any

from blip_jax.runtime import files, json_files

# Rows in which these are the same replace each other.
KEY = ("kind", "size", "image_size", "dtype", "device")

_TYPES = {
  "rows": [
    {
      "kind": str,
      "what": str,
      "size": str,
      "image_size": int,
      "dtype": str,
      "device": str,
    }
  ]
}


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The rows of a file.

  Raises:
    ValueError: there is no such file, or it is no file of results.
  """
  return json_files.read(path, _TYPES).get("rows", [])


def prepare(path: str | os.PathLike) -> None:
  """Writes the file as it is, or without rows, before anything is measured.

  Raises:
    ValueError: the file is there, and is no file of results.
    OSError: it cannot be written.
  """
  _write(path, _read_if_there(path))


def add(path: str | os.PathLike, row: dict[str, Any]) -> None:
  """Adds a row to a file, in place of one with the same key.

  Raises:
    ValueError: the file is there, and is no file of results.
  """
  key = lambda row: [row.get(name) for name in KEY]
  rows = [other for other in _read_if_there(path) if key(other) != key(row)]
  _write(path, [*rows, row])


def _read_if_there(path: str | os.PathLike) -> list[dict[str, Any]]:
  return read(path) if json_files.is_there(path) else []


def _write(path: str | os.PathLike, rows: list[dict[str, Any]]) -> None:
  files.write_json(pathlib.Path(path), {"rows": rows})


COLUMNS = (
  "what",
  "batch",
  "per second",
  "ms (quartiles)",
  "GFLOP",
  "MFU measured / data sheet",
  "compile",
  "ratio",
)


def table(rows: Iterable[dict[str, Any]]) -> str:
  """Markdown: a table for each device, dtype and set of versions."""
  groups: dict[str, list[str]] = {}
  for row in rows:
    groups.setdefault(heading(row), []).append(line(row))
  return "\n\n".join(
    "\n".join([above, *lines]) for above, lines in groups.items()
  )


def heading(row: dict[str, Any]) -> str:
  """What is above the rows of a table: the conditions, and its columns."""
  return "\n".join(
    [_title(row), "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
  )


def _title(row: dict[str, Any]) -> str:
  versions = row.get("versions", {})
  listed = ", ".join(f"{name} {each}" for name, each in versions.items())
  return f"{row['device']}, {row['dtype']}; {listed}:"


def line(row: dict[str, Any]) -> str:
  """A row of a table."""
  what = f"{row['what']}; {row['size']}, {row['image_size']} px"
  if "error" in row:
    cells = [what, *[""] * (len(COLUMNS) - 2), row["error"]]
  else:
    cells = [what, *_cells(row)]
  return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def _cells(row: dict[str, Any]) -> list[str]:
  native = row["native"]
  low, high = native["ms_quartiles"]
  rate = f"{_short(native['per_second'])} {row['unit']}"
  if "per_second_and_core" in native:
    rate += f"; {_short(native['per_second_and_core'])} per core"
  compiling = ""
  if "compiling_seconds" in native:
    lowering = native["lowering_seconds"]
    compiling = f"{lowering:.1f} + {native['compiling_seconds']:.1f} s"
  if "temporary_gb" in native:
    compiling += f", {native['temporary_gb']:.2f} GB"
  return [
    str(native["batch_size"]),
    rate,
    f"{_short(native['ms'])} ({_short(low)} to {_short(high)})",
    _short(row["gflop"]) if "gflop" in row else "",
    _mfu(native),
    compiling,
    _ratios(row),
  ]


def _mfu(native: dict[str, Any]) -> str:
  if "mfu" not in native:
    return ""
  of_datasheet = native.get("mfu_of_datasheet")
  said = "unknown" if of_datasheet is None else f"{of_datasheet:.0%}"
  return f"{native['mfu']:.0%} / {said}"


def _ratios(row: dict[str, Any]) -> str:
  texts = []
  if "share" in row["native"]:
    share = row["native"]["share"]
    texts.append(f"{share:.0%} of the lesser of models and reading")
  for name, peer in row["peers"].items():
    if "ratio" in peer:
      texts.append(f"{peer['ratio']:.2f}x {name}")
    elif "cost" in peer:
      texts.append(f"{peer['cost']:.2f} times {name}")
    elif "note" in peer:
      texts.append(f"{name}: {peer['note']}")
    else:
      texts.append(f"{name} {_short(peer['per_second'])}")
  return "; ".join(texts)


def _short(number: float) -> str:
  """Three digits, or all before the point."""
  if abs(number) >= 100:
    return f"{number:,.0f}"
  return f"{number:.3g}"
