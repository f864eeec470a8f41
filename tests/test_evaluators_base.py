"""Running a program over the rows of a split."""

import jax
import numpy as np
import pytest

from blip_jax.data import scenes
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
