"""The rows of a unit, one a text, as Parquet; and their counts."""

import collections
import io
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from blip_jax.capfilt import label

KEPT, BELOW = "", "below_threshold"
# Names and Arrow's types.
COLUMNS = {
  "key": "string",  # of the picture
  "row": "int64",  # of the picture in its unit
  "image": "string",  # its path, if it is a file of its own
  "image_id": "string",
  "text": "string",
  "source": "string",  # web | synthetic
  "itm_prob": "float32",
  "itc_cosine": "float32",
  "log_prob": "float32",
  "kept": "bool",
  "reason": "string",  # why it was not kept
  "captioner": "string",  # the weights' hash
  "filter": "string",
  "seed": "int64",
}


def of_picture(
  picture: label.Labelled, threshold: float, constant: dict[str, Any]
) -> Iterator[dict[str, Any]]:
  """A row for each text of a picture.

  Args:
    threshold: of `itm_prob`, from which on a text is kept.
    constant: what is the same in all rows: captioner, filter, seed.
  """
  for text in picture.texts:
    reason = text.bad
    if not reason and np.float32(text.itm_prob) < threshold:
      reason = BELOW
    yield {
      "key": picture.key,
      "row": picture.row,
      "image": picture.image or None,
      "image_id": picture.image_id,
      "text": text.text,
      "source": text.source,
      "itm_prob": text.itm_prob,
      "itc_cosine": text.itc_cosine,
      "log_prob": text.log_prob,
      "kept": reason == KEPT,
      "reason": reason or None,
      **constant,
    }


def to_parquet(rows: list[dict[str, Any]]) -> bytes:
  """The same bytes for the same rows."""
  arrow, schema = arrow_and_schema()
  file = io.BytesIO()
  table = arrow.Table.from_pylist(rows, schema)
  arrow.parquet.write_table(table, file, compression="zstd")
  return file.getvalue()


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  arrow, schema = arrow_and_schema()
  return arrow.parquet.read_table(path, schema=schema).to_pylist()


def arrow_and_schema() -> tuple[Any, Any]:
  """The library, which is an extra of the package, and the schema of rows."""
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise ValueError(
      "CapFilt keeps its rows in Parquet, for which pyarrow is not installed: "
      "pip install 'blip_jax[parquet]'"
    ) from error
  types = {name: pyarrow.type_for_alias(kind) for name, kind in COLUMNS.items()}
  return pyarrow, pyarrow.schema(types.items())


class Counts:
  """What went into a unit, and what became of it: in = kept + dropped + bad."""

  def __init__(self, damage: list[str]):
    self.damage = damage
    self.pictures = collections.Counter()
    self.texts = {
      source: collections.Counter() for source in (label.WEB, label.SYNTHETIC)
    }
    self.bad: dict[str, str] = {}

  def add(self, picture: label.Labelled, rows: Iterable[dict]) -> None:
    kept = False
    for row in rows:
      fate = _fate(row)
      self.texts[row["source"]].update(["in", fate])
      kept |= fate == "kept"
    if picture.bad:
      self.bad[picture.key] = picture.bad
    fate = "bad" if picture.bad else "kept" if kept else "dropped"
    self.pictures.update(["in", fate])

  def as_json(self) -> dict[str, Any]:
    fates = ("in", "kept", "dropped", "bad")
    full = lambda counter: {fate: counter[fate] for fate in fates}
    return {
      "pictures": full(self.pictures),
      "texts": {source: full(found) for source, found in self.texts.items()},
      "bad": self.bad,
      "damage": self.damage,
    }


def _fate(row: dict[str, Any]) -> str:
  """Of a text; one that the filter could not look at is bad."""
  if row["kept"]:
    return "kept"
  return "dropped" if row["reason"] == BELOW else "bad"
