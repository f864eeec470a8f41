"""Running a program over the rows of a split."""

import jax
import numpy as np
import pytest

from blip_jax.data import scenes
from tests.colour_task import COLOURS, ColourImages, colour_split


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_results_are_one_per_row_and_in_order(batch_size):
  split = colour_split(ColourImages(), batch_size)
  program = jax.jit(lambda batch: batch["image"][:, 0, 0])
  rows, valid = split.map(program)
  colours = [scenes.COLOURS[name] for name in COLOURS]
  np.testing.assert_array_equal(rows, colours)
  assert valid.all() and len(valid) == 7
