"""Companion files of weights: vocabulary and preprocessing."""

import dataclasses
import json

import pytest

from blip_jax.convert import companions, opening
from blip_jax.data import scenes
from tests import helpers


def test_a_vocabulary_of_another_model_is_refused():
  with pytest.raises(
    ValueError, match=r"expected a vocabulary of 424 .*--tokenizer"
  ):
    opening.open_checkpoint(
      helpers.golden_checkpoint("blip_decoder"),
      model_config=helpers.GOLDEN_CONFIG,
      tokenizer=scenes.vocab_dir(),
    )


def test_a_missing_vocabulary_gives_a_warning():
  checkpoint = opening.open_checkpoint(
    helpers.golden_checkpoint("blip_decoder"),
    model_config=helpers.GOLDEN_CONFIG,
  )
  assert checkpoint.tokenizer is None
  assert any("no vocabulary" in text for text in checkpoint.report.warnings)


@pytest.mark.parametrize(
  ("family", "is_released", "expected"),
  [
    ("caption", False, []),
    ("itm", False, ["[ENC]"]),
    ("vqa", True, ["[ENC]", "padding of questions"]),
    ("vqa", False, ["[ENC]", "padding of questions", "480 x 480"]),
  ],
)
def test_differences_from_hugging_face_give_warnings(
  tmp_path, family, is_released, expected
):
  config = dataclasses.replace(
    helpers.BLIP, vit=dataclasses.replace(helpers.VIT, image_size=(384, 384))
  )
  warnings = companions.hugging_face_warnings(
    tmp_path, family, config, is_released
  )
  assert len(warnings) == len(expected)
  for warning, words in zip(warnings, expected, strict=True):
    assert words in warning


def test_other_pixel_statistics_give_a_warning(tmp_path):
  text = json.dumps({"image_mean": [0.5, 0.5, 0.5]})
  (tmp_path / "preprocessor_config.json").write_text(text)
  (warning,) = companions.hugging_face_warnings(
    tmp_path, "caption", helpers.BLIP, True
  )
  assert "image_mean is [0.5, 0.5, 0.5]; replaced by [0.48145466" in warning
