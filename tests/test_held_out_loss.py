"""The training loss on held-out rows."""

import numpy as np
import pytest

from blip_jax.evaluators import held_out_loss
from tests.colour_task import ColourImages, ColourTask, colour_split, evaluate


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
