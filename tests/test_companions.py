"""Companion files of weights: vocabulary and preprocessing."""

import dataclasses
import json

import numpy as np
import pytest

import blip_jax
from blip_jax.convert import companions, opening, write
from blip_jax.data import scenes
from blip_jax.models import card as card_lib
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
  family, is_released, expected
):
  config = dataclasses.replace(
    helpers.BLIP, vit=dataclasses.replace(helpers.VIT, image_size=(384, 384))
  )
  warnings = companions.hugging_face_warnings(family, config, is_released)
  assert len(warnings) == len(expected)
  for warning, words in zip(warnings, expected, strict=True):
    assert words in warning


def with_image_processor(folder, name, **changes):
  """The preprocessing of a model, changed, as transformers writes it."""
  card = card_lib.Card("caption", helpers.BLIP)
  values = {**companions.preprocessing(card), **changes}
  if name == "processor_config.json":
    values = {"image_processor": values, "processor_class": "BlipProcessor"}
  (folder / name).write_text(json.dumps(values))
  return companions.image_warnings(folder, card)


@pytest.mark.parametrize(
  "name", ["preprocessor_config.json", "processor_config.json"]
)
@pytest.mark.parametrize(
  "changes, expected",
  [
    ({}, None),
    ({"rescale_factor": 0.00392156862745098}, None),
    ({"image_processor_type": "BlipImageProcessorFast"}, None),
    ({"size": 32}, None),
    (
      {"image_mean": [0.5, 0.5, 0.5]},
      "image_mean is [0.5, 0.5, 0.5]; [0.48145466",
    ),
    ({"image_std": [1, 1, 1]}, "image_std is [1, 1, 1]; [0.26862954"),
    ({"size": {"height": 64, "width": 64}}, "(image_size=)"),
    ({"size": {"shortest_edge": 32}}, "size is {'shortest_edge': 32}"),
    ({"resample": 2}, "resample is 2; 3 is used"),
    ({"do_center_crop": True}, "do_center_crop is True; False is used"),
    ({"do_pad": True}, "do_pad is True"),
    ({"do_normalize": False}, "do_normalize is False; True is used"),
    ({"do_rescale": False}, "do_rescale is False"),
    ({"rescale_factor": 1 / 127.5}, "rescale_factor is 0.00784"),
    ({"do_resize": False}, "do_resize is False"),
    ({"do_convert_rgb": False}, "do_convert_rgb is False"),
    ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
  ],
)
def test_other_preprocessing_gives_a_warning(tmp_path, name, changes, expected):
  warnings = with_image_processor(tmp_path, name, **changes)
  if expected is None:
    assert not warnings
  else:
    (warning,) = warnings
    assert warning.startswith(f"{name}: ") and expected in warning


def hugging_face_folder(tmp_path, **generation):
  checkpoint = helpers.open_golden("blip_decoder")
  folder = write.write(checkpoint, tmp_path / "hf", "hf")
  text = json.dumps(generation)
  (folder / "generation_config.json").write_text(text)
  return folder


@pytest.mark.parametrize(
  "generation, expected",
  [
    ({}, {}),
    ({"num_beams": 5, "max_length": 12}, {"num_beams": 5, "max_length": 12}),
    (
      {"max_new_tokens": 7, "min_new_tokens": 2},
      dict(max_length=8, min_length=3),
    ),
    (
      {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "top_k": None},
      {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ),
    ({"do_sample": True}, {"sample": True, "num_beams": 1, "top_k": 50}),
    (
      {"do_sample": True, "top_k": 7, "top_p": 0.5, "temperature": 0.8},
      dict(sample=True, num_beams=1, top_k=7, top_p=0.5, temperature=0.8),
    ),
  ],
)
def test_the_generation_config_of_a_model_is_used(
  tmp_path, generation, expected
):
  ids = {"bos_token_id": 422, "eos_token_id": 3, "transformers_version": "5"}
  folder = hugging_face_folder(tmp_path, **generation, **ids)
  checkpoint = opening.open_checkpoint(folder)
  defaults = card_lib.GENERATION["caption"]
  assert checkpoint.card.generation == {**defaults, **expected}
  assert not checkpoint.report.warnings
  model = blip_jax.load(folder)
  model.caption(np.zeros((8, 8, 3), np.uint8))


def test_generation_options_that_are_not_implemented_give_a_warning(tmp_path):
  folder = hugging_face_folder(
    tmp_path, length_penalty=2.0, early_stopping=True, num_beam_groups=1
  )
  checkpoint = opening.open_checkpoint(folder)
  assert checkpoint.report.warnings == [
    "generation_config.json: length_penalty is 2.0, which is not implemented; "
    "captions differ from Hugging Face's",
    "generation_config.json: early_stopping is True, which is not implemented; "
    "captions differ from Hugging Face's",
  ]


def test_a_loaded_model_warns_about_other_preprocessing(tmp_path):
  folder = hugging_face_folder(tmp_path)
  (folder / "preprocessor_config.json").unlink()
  values = {"image_processor": {"image_mean": [0, 0, 0]}}
  (folder / "processor_config.json").write_text(json.dumps(values))
  (warning,) = opening.open_checkpoint(folder).report.warnings
  assert warning.startswith("processor_config.json: image_mean is [0, 0, 0]")
