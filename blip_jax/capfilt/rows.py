"""The rows of a unit, one a text, as Parquet; and their counts."""

import collections
import io
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from blip_jax.capfilt import label

try:
  import pyarrow
  import pyarrow.parquet
except ImportError as error:
  raise ImportError(
    "CapFilt keeps its rows in Parquet, which needs pyarrow: pip install "
    "'blip_jax[parquet]'"
  ) from error

KEPT, BELOW = "", "below_threshold"
SCHEMA = pyarrow.schema(
  [
    ("key", pyarrow.string()),  # of the picture
    ("row", pyarrow.int64()),  # of the picture in its unit's source
    ("image", pyarrow.string()),  # its path, if it is a file of its own
    ("image_id", pyarrow.string()),
    ("text", pyarrow.string()),
    ("source", pyarrow.string()),  # web | synthetic
    ("itm_prob", pyarrow.float32()),
    ("itc_cosine", pyarrow.float32()),
    ("log_prob", pyarrow.float32()),
    ("kept", pyarrow.bool_()),
    ("reason", pyarrow.string()),  # why it was not kept
    ("captioner", pyarrow.string()),  # the weights' hash
    ("filter", pyarrow.string()),
    ("seed", pyarrow.int64()),
  ]
)


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
  file = io.BytesIO()
  table = pyarrow.Table.from_pylist(rows, SCHEMA)
  pyarrow.parquet.write_table(table, file, compression="zstd")
  return file.getvalue()


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  return pyarrow.parquet.read_table(path, schema=SCHEMA).to_pylist()


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
