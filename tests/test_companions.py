"""Companion files of weights: vocabulary and preprocessing."""

import dataclasses
import json

import numpy as np
import pytest

import blip_jax
from blip_jax.convert import companions, opening, weights, write
from blip_jax.data import scenes
from blip_jax.models import card as card_lib
from blip_jax.models import config as config_lib
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


@pytest.mark.parametrize(
  "content, expected",
  [
    ('{"num_beams": "three"}', "num_beams: expected an integer"),
    ('{"max_length": 1.5}', "max_length: expected an integer"),
    ('{"do_sample": "no"}', "do_sample: expected true or false"),
    ('{"top_p": 0.0}', "top_p: expected a positive number"),
    ('{"top_p": 1.5}', "top_p: expected at most 1"),
    ('{"temperature": -1}', "temperature: expected a positive number"),
    ('{"num_beams": 2, "num_return_sequences": 3}', "num_return_sequences: 3"),
    ("[]", "expected an object"),
    ("{", "cannot be read as JSON"),
  ],
)
def test_a_generation_config_that_cannot_be_used_is_named(
  tmp_path, content, expected
):
  folder = hugging_face_folder(tmp_path)
  (folder / "generation_config.json").write_text(content)
  with pytest.raises(ValueError, match="generation_config.json.*" + expected):
    blip_jax.load(folder)


def test_token_ids_that_contradict_the_vocabulary_give_a_warning(tmp_path):
  checkpoint = helpers.open_golden("blip_decoder")
  folder = write.write(checkpoint, tmp_path / "hf", "hf")
  config = json.loads((folder / "config.json").read_text())
  config["text_config"] |= {"bos_token_id": 5, "sep_token_id": None}
  (folder / "config.json").write_text(json.dumps(config))
  opened = opening.open_checkpoint(folder)
  dec = checkpoint.tokenizer.dec_id
  assert opened.card.config.med.tokens.dec == dec
  (warning,) = opened.report.warnings
  assert "config.json" in warning and "[DEC] is token 5" in warning
  assert f"it is {dec}" in warning


def test_a_loaded_model_warns_about_other_preprocessing(tmp_path):
  folder = hugging_face_folder(tmp_path)
  (folder / "preprocessor_config.json").unlink()
  values = {"image_processor": {"image_mean": [0, 0, 0]}}
  (folder / "processor_config.json").write_text(json.dumps(values))
  (warning,) = opening.open_checkpoint(folder).report.warnings
  assert warning.startswith("processor_config.json: image_mean is [0, 0, 0]")


def test_the_preprocessing_of_a_model():
  config = dataclasses.replace(
    helpers.BLIP, vit=dataclasses.replace(helpers.VIT, image_size=(16, 24))
  )
  card = card_lib.Card("caption", config)
  assert companions.preprocessing(card) == {
    "image_processor_type": "BlipImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": 16, "width": 24},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 0.00392156862745098,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
  }


VIT = {"embed_dim": 48, "depth": 2, "num_heads": 4, "patch_size": 8}
TEXT = {"hidden_size": 64, "num_attention_heads": 4}


@pytest.mark.parametrize(
  "files, config, heads_of_vit",
  [
    ({}, None, None),
    ({"config.json": {"vit": VIT, "text": TEXT}}, None, 4),
    # The second part of the original's config, if the first lacks it.
    ({"med.json": TEXT, "vit.json": VIT}, "med.json", 4),
    ({"med_config.json": TEXT, "vit.json": VIT}, None, 4),
    ({"med.json": TEXT}, "med.json", None),
    ({"vit.json": VIT}, None, None),
    # A complete config needs no second part.
    (
      {
        "both.json": {"vit": VIT, "text": TEXT},
        "vit.json": {**VIT, "num_heads": 9},
      },
      "both.json",
      4,
    ),
  ],
)
def test_where_the_config_of_a_model_is(tmp_path, files, config, heads_of_vit):
  for name, value in files.items():
    (tmp_path / name).write_text(json.dumps(value))
  hints = companions.hints(tmp_path, config and tmp_path / config)
  assert hints.vit.get("num_heads") == heads_of_vit
  assert bool(hints.med) == any("con" in name or config for name in files)


def test_the_folder_of_weights(tmp_path):
  (tmp_path / "a.pth").touch()
  assert companions.folder_of(tmp_path) == tmp_path
  assert companions.folder_of(tmp_path / "a.pth") == tmp_path


@pytest.mark.parametrize(
  "change, is_same", [(0.0, True), (9e-7, True), (1.1e-6, False), (-9e-7, True)]
)
def test_statistics_may_be_rounded_to_six_digits(tmp_path, change, is_same):
  mean = [0.48145466, 0.4578275, 0.40821073 + change]
  warnings = with_image_processor(
    tmp_path, "preprocessor_config.json", image_mean=mean
  )
  assert (not warnings) == is_same


def test_a_vqa_model_in_its_own_size_gives_no_warning_about_it():
  vit = dataclasses.replace(helpers.VIT, image_size=(480, 480), patch_size=16)
  config = dataclasses.replace(helpers.BLIP, vit=vit)
  warnings = companions.hugging_face_warnings("vqa", config, False)
  assert len(warnings) == 2


@pytest.mark.parametrize(
  "key, value, is_neutral",
  [
    ("length_penalty", 1.0, True),
    ("length_penalty", 1, True),
    ("length_penalty", 0.0, False),
    ("length_penalty", 2.0, False),
    ("diversity_penalty", 0.0, True),
    ("diversity_penalty", 1.0, False),
    ("encoder_no_repeat_ngram_size", 0, True),
    ("encoder_no_repeat_ngram_size", 1, False),
    ("typical_p", 1.0, True),
    ("typical_p", 0.0, False),
    ("min_p", 0.0, True),
    ("max_time", 1.0, False),
    ("max_time", 0, False),
    ("forced_bos_token_id", 5, False),
    ("forced_eos_token_id", 0, False),
    ("forced_eos_token_id", None, True),
    ("begin_suppress_tokens", [], True),
    ("begin_suppress_tokens", [0], False),
    ("output_scores", True, True),
    ("num_beam_groups", 1, True),
    ("early_stopping", True, False),
    ("early_stopping", False, True),
    ("bad_words_ids", None, True),
    ("bad_words_ids", [], True),
    ("bad_words_ids", [[5]], False),
    ("eos_token_id", 7, True),
    ("decoder_start_token_id", 7, True),
    ("use_cache", True, True),
    ("_from_model_config", True, True),
    ("transformers_version", "4.30", True),
  ],
)
def test_options_that_change_nothing(key, value, is_neutral):
  assert companions._neutral(key, value) == is_neutral


class Loaded(Exception):
  """A vocabulary was asked for."""


@pytest.mark.parametrize(
  "size, given, asked",
  [
    (30524, None, "bert-base-uncased"),
    (424, None, None),
    (424, "mine", "mine"),
    (30524, "mine", "mine"),
  ],
)
def test_the_vocabulary_of_bert_serves_models_of_its_size(
  tmp_path, monkeypatch, size, given, asked
):
  def load(name):
    raise Loaded(name)

  monkeypatch.setattr(companions.tokenizer_lib.Tokenizer, "load", load)
  med = dataclasses.replace(
    helpers.MED, vocab_size=size, tokens=config_lib.SpecialTokens()
  )
  card = card_lib.Card("caption", dataclasses.replace(helpers.BLIP, med=med))
  report = weights.Report()
  if asked is None:
    found, vocabulary = companions.tokenizer_of(card, tmp_path, given, report)
    assert found == card and vocabulary is None
    (warning,) = report.warnings
    assert "424 tokens is not BERT's" in warning
  else:
    with pytest.raises(Loaded, match=f"^{asked}$"):
      companions.tokenizer_of(card, tmp_path, given, report)


def test_the_vocabulary_next_to_the_weights_comes_first(tmp_path, monkeypatch):
  asked = []

  def load(name):
    asked.append(name)
    raise Loaded

  monkeypatch.setattr(companions.tokenizer_lib.Tokenizer, "load", load)
  (tmp_path / "vocab.txt").write_text("[PAD]\n")
  card = card_lib.Card("caption", helpers.BLIP)
  for path in (tmp_path, tmp_path / "model.pth"):
    with pytest.raises(Loaded):
      companions.tokenizer_of(card, path, None, weights.Report())
  assert asked == [tmp_path, tmp_path]
