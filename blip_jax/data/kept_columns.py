"""Further columns, which records keep under their own names."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from blip_jax.data import cells, sources

# Keys that records have a meaning for; `keep` cannot name them.
_RESERVED = ("image", "caption", "id", "image_id")


def names(keep: Sequence[str]) -> tuple[str, ...]:
  """Returns the names of the columns to keep, each once.

  Raises:
    ValueError: a key that records have anyway is among them.
  """
  if isinstance(keep, str):
    raise ValueError(f"keep: expected a tuple of column names, found {keep!r}.")
  kept = tuple(dict.fromkeys(keep))
  reserved = [name for name in kept if name in _RESERVED]
  if reserved:
    raise ValueError(
      f"keep={list(kept)}: {reserved} cannot be kept, because records have "
      "these keys already. ?image=COLUMN&caption=COLUMN selects their columns."
    )
  return kept


def check(keep: Iterable[str], columns: Collection[str], where: str) -> None:
  """Raises `ValueError` unless all columns to keep are there."""
  missing = [name for name in keep if name not in columns]
  if missing:
    raise ValueError(
      f"{where}: expected the columns {missing} that 'keep' names, found the "
      f"columns {list(columns)}."
    )


def values(
  keep: Iterable[str], row: Mapping[str, Any], id: str, where: str
) -> sources.Record:
  """Returns the values of the columns to keep, by name.

  Raises:
    BadRow: the row has none under one of the names, or null or NaN.
  """
  found = {name: row.get(name) for name in keep}
  for name, value in found.items():
    if cells.is_missing(value) and not isinstance(value, str):
      detail = f"{where}: nothing under {name!r}, which 'keep' names"
      raise sources.BadRow(id, "missing_column", detail)
  return found
