"""Conversion between external and native names."""

import numpy as np
import pytest

from blip_jax.convert import opening, weights
from tests import helpers


def test_an_untied_lm_matrix_is_used_with_a_warning(tmp_path):
  """Released pre-training files may have one: the original's loader takes the
  later of the two tied names."""
  matrix = "text_decoder.cls.predictions.decoder.weight"

  def untie(state):
    state[matrix] = state[matrix] + 1

  checkpoint = opening.open_checkpoint(
    helpers.save_changed(tmp_path, untie), **helpers.OPEN_GOLDEN
  )
  assert any(matrix in text for text in checkpoint.report.warnings)
  np.testing.assert_array_equal(
    checkpoint.leaves["params/text_decoder/word_embeddings"].read(),
    helpers.state_dict("blip_decoder")[matrix] + 1,
  )


def add(state):
  state["text_decoder.bert.pooler.dense.weight"] = np.zeros(2, np.float32)


def test_unknown_names_may_be_dropped_by_pattern(tmp_path):
  path = helpers.save_changed(tmp_path, add)
  drop = [r"text_decoder\.bert\.pooler\..*"]
  checkpoint = opening.open_checkpoint(path, drop=drop, **helpers.OPEN_GOLDEN)
  assert checkpoint.report.dropped[weights.ON_REQUEST] == [
    "text_decoder.bert.pooler.dense.weight"
  ]
  # Dropping a name that the model needs is an error.
  with pytest.raises(
    ValueError, match=r" - params/visual_encoder/ln_post/bias"
  ):
    opening.open_checkpoint(
      path, drop=[*drop, r".*encoder\.norm\.bias"], **helpers.OPEN_GOLDEN
    )
