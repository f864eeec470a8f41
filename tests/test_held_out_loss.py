"""The training loss on held-out rows."""

import numpy as np
import pytest

from blip_jax.evaluators import held_out_loss
from tests.colour_task import ColourImages, ColourTask, colour_split, evaluate


def test_batches_with_a_bad_row_are_told(caplog):
  rows = ColourImages() + ColourImages() + ColourImages(2)
  split = colour_split([*rows[:3], {**rows[3], "image": b"broken"}, *rows[4:]])
  held_out = held_out_loss.HeldOutLoss(split, ColourTask())
  result = evaluate(held_out)
  images = np.stack([row["image"] for row in rows[8:]]).astype(np.float64)
  assert result == {"loss": pytest.approx(images.mean(), rel=1e-5)}
  assert "of 1 of 2 batches" in caplog.text


def test_losses_are_averaged_over_full_batches():
  """Seven rows make no full batch of eight, and sixteen make two."""
  assert (
    evaluate(
      held_out_loss.HeldOutLoss(
        colour_split(ColourImages()),
        ColourTask(),
      )
    )
    == {}
  )
  two = ColourImages() + ColourImages() + ColourImages(2)
  result = evaluate(held_out_loss.HeldOutLoss(colour_split(two), ColourTask()))
  images = np.stack([row["image"] for row in two]).astype(np.float64)
  assert result == {"loss": pytest.approx(images.mean(), rel=1e-5)}
