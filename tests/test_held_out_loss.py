"""The training loss on held-out rows."""

import numpy as np
import pytest

from blip_jax.evaluators import held_out_loss
from tests import helpers


def test_losses_are_averaged_over_full_batches():
  """Seven rows make no full batch of eight, and sixteen make two."""
  assert (
    helpers.evaluate(
      held_out_loss.HeldOutLoss(
        helpers.colour_split(helpers.ColourImages()), helpers.ColourTask()
      )
    )
    == {}
  )
  two = (
    helpers.ColourImages() + helpers.ColourImages() + helpers.ColourImages(2)
  )
  result = helpers.evaluate(
    held_out_loss.HeldOutLoss(helpers.colour_split(two), helpers.ColourTask())
  )
  images = np.stack([row["image"] for row in two]).astype(np.float64)
  assert result == {"loss": pytest.approx(images.mean(), rel=1e-5)}
