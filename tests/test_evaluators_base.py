"""Running a program over the rows of a split."""

import json

import jax
import numpy as np
import pytest

from blip_jax.data import rejects, scenes
from blip_jax.evaluators import base
from blip_jax.runtime.config import Config
from tests.colour_task import (
  COLOURS,
  ColourImages,
  ColourTask,
  colour_split,
)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_results_are_one_per_row_and_in_order(batch_size):
  split = colour_split(ColourImages(), batch_size)
  program = jax.jit(lambda batch: batch["image"][:, 0, 0])
  rows, valid = split.map(program)
  colours = [scenes.COLOURS[name] for name in COLOURS]
  np.testing.assert_array_equal(rows, colours)
  assert valid.all() and len(valid) == 7


def test_the_log_says_how_many_images_and_captions_a_split_has(caplog):
  rows = ColourImages(3, captions=2) + ColourImages(2, bad=[1])
  split = colour_split(rows)
  context = base.Context(
    "val",
    Config(),
    Config({"evals": {"batch_size": 4}}),
    ColourTask(),
    split.example,
    split.mesh,
    split.bad_samples,
    "",
  )
  with caplog.at_level("INFO", "blip_jax.evaluators"):
    context.split(rows)
  # The second red image is the first once more; an empty file is an image of
  # its own, until it is decoded.
  (record,) = caplog.records
  assert record.getMessage() == "Split val: 4 images, 8 captions, in 5 rows"


def test_rows_that_cannot_be_used_are_no_images_of_a_split(tmp_path, caplog):
  """They are listed once, however many evaluators meet them."""
  rows = ColourImages(3, captions=2)
  rows[1]["caption"].append("")
  rows.append(rows[0] | {"id": "images:3", "caption": ""})
  split = colour_split(rows)
  listed = rejects.BadSamples(tmp_path / "bad.jsonl", max_fraction=0.9)
  context = base.Context(
    "val",
    Config(),
    Config({"evals": {"batch_size": 4}}),
    ColourTask(),
    split.example,
    split.mesh,
    listed,
    "",
  )
  with caplog.at_level("INFO", "blip_jax.evaluators"):
    split = context.split(rows)
  messages = [
    record.getMessage() for record in caplog.records if record.name != "absl"
  ]
  assert messages == [
    "Split val: 3 images, 6 captions, in 4 rows",
    "Split val: 2 rows or captions cannot be used",
  ]
  for each in (split, split.by_image):
    for _ in each.batches():
      pass
  bad = [json.loads(line) for line in (tmp_path / "bad.jsonl").open()]
  assert [(row["id"], row["reason"]) for row in bad] == [
    ("images:1#2", "empty_caption"),
    ("images:3", "empty_caption"),
  ]
