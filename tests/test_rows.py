"""Rows of texts: which are kept, their columns, and their counts."""

import hashlib
import io
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from blip_jax.capfilt import label, rows
from blip_jax.runtime import files

CONSTANTS = {"captioner": "c0", "filter": "f0", "seed": 3}
IMAGE = label.LabelledImage(
  row=4,
  key="a.json:4",
  path="a/4.png",
  image_id="17",
  texts=(
    label.Text("a dog", "web", itm_prob=0.75, itc_cosine=0.5),
    label.Text("click here", "web", itm_prob=0.25, itc_cosine=0.125),
    label.Text("...", "web", bad="empty_caption"),
    label.Text("a cat", "synthetic", "", 0.5, -0.5, -2.0),
  ),
)


def test_an_image_has_a_row_per_text():
  table = [*rows.of_image(IMAGE, 0.5, CONSTANTS)]
  shared = {
    "key": "a.json:4",
    "row": 4,
    "image": "a/4.png",
    "image_id": "17",
    "captioner": "c0",
    "filter": "f0",
    "seed": 3,
  }
  assert table[1] == shared | {
    "text": "click here",
    "source": "web",
    "itm_prob": 0.25,
    "itc_cosine": 0.125,
    "log_prob": None,
    "kept": False,
    "reason": "below_threshold",
  }
  assert [row["kept"] for row in table] == [True, False, False, True]
  assert [row["reason"] for row in table] == [
    None,
    "below_threshold",
    "empty_caption",
    None,
  ]
  assert all(shared.items() <= row.items() for row in table)


def test_a_probability_equal_to_the_threshold_is_kept():
  prob = float(np.float32(0.7))  # as a double, slightly less than 0.7
  assert prob < 0.7
  text = label.Text("a dog", "web", itm_prob=prob, itc_cosine=0.0)
  image = label.LabelledImage(0, "k", texts=(text,))
  (row,) = rows.of_image(image, 0.7, CONSTANTS)
  assert row["kept"]


def test_the_parquet_columns():
  table = [*rows.of_image(IMAGE, 0.5, CONSTANTS)]
  content = rows.to_parquet(table)
  schema = pyarrow.parquet.read_schema(io.BytesIO(content))
  assert {field.name: str(field.type) for field in schema} == {
    "key": "string",
    "row": "int64",
    "image": "string",
    "image_id": "string",
    "text": "string",
    "source": "string",
    "itm_prob": "float",
    "itc_cosine": "float",
    "log_prob": "float",
    "kept": "bool",
    "reason": "string",
    "captioner": "string",
    "filter": "string",
    "seed": "int64",
  }
  assert rows.to_parquet(table) == content


def test_rows_are_read_as_written(tmp_path):
  table = [*rows.of_image(IMAGE, 0.5, CONSTANTS)]
  (tmp_path / "a.parquet").write_bytes(rows.to_parquet(table))
  assert rows.read(tmp_path / "a.parquet") == table


def test_counts_add_up_by_outcome():
  counts = rows.Counts(["0.tar: cut off"])
  for image in (
    IMAGE,
    label.LabelledImage(5, "b", texts=IMAGE.texts[1:2]),
    label.LabelledImage(6, "c", bad="unreadable: no"),
    label.LabelledImage(7, "d"),
  ):
    counts.add(image, rows.of_image(image, 0.5, CONSTANTS))
  assert counts.as_json() == {
    "images": {"in": 4, "kept": 1, "dropped": 2, "bad": 1},
    "texts": {
      "web": {"in": 4, "kept": 1, "dropped": 2, "bad": 1},
      "synthetic": {"in": 1, "kept": 1, "dropped": 0, "bad": 0},
    },
    "bad": {"c": "unreadable: no"},
    "damage": ["0.tar: cut off"],
  }


def test_missing_pyarrow_is_an_error_that_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(ValueError, match=r"pip install 'blip_jax\[parquet\]'"):
    rows.arrow_and_schema()


@pytest.mark.parametrize("name", ["itm_prob", "itc_cosine", "log_prob"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_makes_a_text_bad(name, value):
  scores = {"itm_prob": 0.9, "itc_cosine": 0.5, "log_prob": -2.0, name: value}
  text = label.Text("a cat", "synthetic", **scores)
  image = label.LabelledImage(0, "k", texts=(text,))
  (row,) = rows.of_image(image, 0.0, CONSTANTS)
  assert not row["kept"] and row["reason"] == "bad_score"
  assert [row["itm_prob"], row["itc_cosine"], row["log_prob"]] == [None] * 3
  counts = rows.Counts([])
  counts.add(image, [row])
  expected = {"in": 1, "kept": 0, "dropped": 0, "bad": 1}
  assert counts.as_json()["texts"]["synthetic"] == expected


def test_rows_other_than_those_that_were_written_are_refused(tmp_path):
  """Any flipped bit, also one that Arrow does not notice."""
  table = [*rows.of_image(IMAGE, 0.5, CONSTANTS)]
  content, path = rows.to_parquet(table), tmp_path / "a.parquet"
  sha256 = hashlib.sha256(content).hexdigest()
  path.write_bytes(content)
  assert rows.read(path, sha256) == table
  for at in range(0, len(content), 97):
    flipped = bytearray(content)
    flipped[at] ^= 1 << at % 8
    path.write_bytes(flipped)
    with pytest.raises(files.DamagedFile, match=r"a\.parquet.*a\.done\.json"):
      rows.read(path, sha256)
