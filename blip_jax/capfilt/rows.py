"""Parquet rows of a work unit, one per text, and their counts."""

import collections
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from blip_jax.capfilt import label
from blip_jax.runtime import files

KEPT, BELOW = "", "below_threshold"
# Names and Arrow types.
COLUMNS = {
  "key": "string",  # id of the image
  "row": "int64",  # index of the image in the source of its work unit
  "image": "string",  # its path, printable, if it is a file of its own
  "image_id": "string",
  "text": "string",
  "source": "string",  # web | synthetic
  "itm_prob": "float32",
  "itc_cosine": "float32",
  "log_prob": "float32",
  "kept": "bool",
  "reason": "string",  # why it was not kept
  "captioner": "string",  # hash of the weights
  "filter": "string",
  "seed": "int64",
}
_OUTCOMES = ("in", "kept", "dropped", "bad")


def of_image(
  image: label.LabelledImage, threshold: float, constants: dict[str, Any]
) -> Iterator[dict[str, Any]]:
  """Yields a row for each text of an image.

  Args:
    image: with its scores.
    threshold: the least `itm_prob` of a text that is kept.
    constants: columns that are equal in all rows: captioner, filter, seed.
  """
  for text in image.texts:
    reason = text.bad
    if not reason and np.float32(text.itm_prob) < threshold:
      reason = BELOW
    yield {
      "key": image.key,
      "row": image.row,
      "image": files.printable(image.path) or None,
      "image_id": image.image_id,
      "text": text.text,
      "source": text.source,
      "itm_prob": text.itm_prob,
      "itc_cosine": text.itc_cosine,
      "log_prob": text.log_prob,
      "kept": reason == KEPT,
      "reason": reason or None,
      **constants,
    }


def to_parquet(rows: list[dict[str, Any]]) -> bytes:
  """Returns a Parquet file; equal rows give equal bytes."""
  arrow, schema = arrow_and_schema()
  file = io.BytesIO()
  table = arrow.Table.from_pylist(rows, schema)
  arrow.parquet.write_table(table, file, compression="zstd")
  return file.getvalue()


def read(path: files.Path, sha256: str = "") -> list[dict[str, Any]]:
  """Reads the rows of a work unit.

  Args:
    path: of its Parquet file.
    sha256: its hash, as the done-file has it; "" accepts any rows.

  Raises:
    files.DamagedFile: it has another hash, is no Parquet file, or has other
      columns.
  """
  arrow, schema = arrow_and_schema()
  content = files.read_bytes(path)
  found = hashlib.sha256(content).hexdigest()
  if sha256 and found != sha256:
    raise _damaged(path, f"expected the SHA-256 {sha256}, found {found}")
  try:
    table = arrow.parquet.read_table(io.BytesIO(content), schema=schema)
    return table.to_pylist()
  # Of Parquet that is overwritten, Arrow raises nearly anything.
  except Exception as error:
    problem = f"no Parquet file with the rows of a work unit: {error}"
    raise _damaged(path, problem) from error


def _damaged(path: files.Path, problem: str) -> files.DamagedFile:
  done = os.fspath(path).removesuffix(".parquet") + ".done.json"
  hint = (
    f"To do this work unit again, delete {done} and run the command that "
    "started the job (config.job=capfilt)"
  )
  return files.DamagedFile(path, problem, hint)


def arrow_and_schema() -> tuple[Any, Any]:
  """Returns pyarrow, an optional dependency, and the schema of the rows.

  Raises:
    ValueError: pyarrow is not installed.
  """
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError as error:
    raise ValueError(
      "CapFilt stores its rows in Parquet files, but pyarrow is not installed; "
      "run pip install 'blip_jax[parquet]'"
    ) from error
  types = {name: pyarrow.type_for_alias(kind) for name, kind in COLUMNS.items()}
  return pyarrow, pyarrow.schema(types.items())


class Counts:
  """Counts of a work unit by outcome, where in = kept + dropped + bad.

  Args:
    damage: what is damaged in the input, so that images are missing.
  """

  def __init__(self, damage: list[str]):
    self.damage = damage
    self.images = collections.Counter()
    self.texts = {
      source: collections.Counter() for source in (label.WEB, label.SYNTHETIC)
    }
    self.bad: dict[str, str] = {}

  def add(
    self, image: label.LabelledImage, rows: Iterable[dict[str, Any]]
  ) -> None:
    """Counts an image and its rows."""
    any_kept = False
    for row in rows:
      outcome = _outcome(row)
      self.texts[row["source"]].update(["in", outcome])
      any_kept |= outcome == "kept"
    if image.bad:
      self.bad[image.key] = image.bad
    outcome = "bad" if image.bad else "kept" if any_kept else "dropped"
    self.images.update(["in", outcome])

  def as_json(self) -> dict[str, Any]:
    """Returns the counts as the done-file has them."""
    by_outcome = lambda counts: {name: counts[name] for name in _OUTCOMES}
    return {
      "images": by_outcome(self.images),
      "texts": {
        source: by_outcome(counts) for source, counts in self.texts.items()
      },
      "bad": self.bad,
      "damage": self.damage,
    }


def _outcome(row: dict[str, Any]) -> str:
  """A text that the filter could not score is bad."""
  if row["kept"]:
    return "kept"
  return "dropped" if row["reason"] == BELOW else "bad"
