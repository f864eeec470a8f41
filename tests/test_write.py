"""Checkpoints are written completely or not at all."""

import dataclasses
import json
import logging

import numpy as np
import pytest

from blip_jax.convert import opening, write
from blip_jax.models import card as card_lib
from blip_jax.models import config as config_lib
from tests import helpers


@pytest.mark.parametrize("layout", write.LAYOUTS)
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, layout):
  """The disk is full after the weights."""

  def full(*_):
    raise OSError(28, "No space left on device")

  checkpoint = helpers.open_golden("blip_decoder")
  monkeypatch.setattr(write.companions, "model_files", full)
  with pytest.raises(OSError, match="No space left"):
    write.write(checkpoint, tmp_path / "out", layout)
  assert not list(tmp_path.iterdir())


def test_models_without_a_hugging_face_class_are_refused(tmp_path):
  checkpoint = helpers.open_golden("blip_pretrain")
  with pytest.raises(ValueError, match=r"no class for a pretrain .*--task"):
    write.write(checkpoint, tmp_path / "out", "hf")
  vqa = helpers.open_golden("blip_pretrain", task="vqa")
  with pytest.raises(ValueError, match=r"transformers cannot hold"):
    write.write(vqa, tmp_path / "out", "hf")
  assert not list(tmp_path.iterdir())


@pytest.fixture
def extended(tmp_path):
  """A checkpoint whose last two words before [DEC] are added tokens."""
  folder = tmp_path / "vocabulary"
  folder.mkdir()
  lines = (helpers.GOLDEN_TOKENIZER / "vocab.txt").read_text().splitlines()
  (folder / "vocab.txt").write_text("\n".join(lines[:-2]) + "\n")
  added = {"red circle": len(lines) - 2, "zorkon": len(lines) - 1}
  (folder / "added_tokens.json").write_text(json.dumps(added))
  return opening.open_checkpoint(
    helpers.golden_checkpoint("blip_decoder"),
    model_config=helpers.GOLDEN_CONFIG,
    tokenizer=folder,
  )


@pytest.mark.parametrize("layout", write.LAYOUTS)
def test_added_tokens_are_in_every_layout(tmp_path, extended, layout):
  write.write(extended, tmp_path / "out", layout)
  again = opening.open_checkpoint(tmp_path / "out")
  texts = ["a zorkon", "a red circle"]
  ids, _ = again.tokenizer.encode(texts, 6)
  np.testing.assert_array_equal(ids, extended.tokenizer.encode(texts, 6)[0])
  assert again.tokenizer.pieces(ids[:, 2].tolist()) == ["zorkon", "red circle"]


def test_a_file_of_weights_alone_has_no_vocabulary(tmp_path, extended, caplog):
  with caplog.at_level(logging.WARNING):
    write.write(extended, tmp_path / "out.pth", "original")
  assert "vocabulary of 424 tokens is not in this file" in caplog.text


@pytest.mark.parametrize(
  "name",
  [
    "blip_base",
    "blip_decoder",
    "blip_itm",
    "blip_vqa",
    "blip_retrieval",
    "blip_pretrain",
  ],
)
def test_the_original_gets_every_name_that_it_saves(name):
  """Values too: tied tensors under all of their names, and position ids."""
  checkpoint = helpers.open_golden(name)
  tensors, ties = write.original_state(
    checkpoint.leaves, checkpoint.card.family
  )
  expected = helpers.state_dict(name)
  assert {*tensors, *ties} == {*expected}
  assert not {*tensors} & {*ties}
  for key, array in expected.items():
    found = tensors[ties.get(key, key)].read()
    np.testing.assert_array_equal(found, array, key)
    assert found.dtype == array.dtype, key


def test_the_configs_of_the_original():
  checkpoint = helpers.open_golden("blip_decoder")
  config = write._med_config(checkpoint.card.config)
  # A config file that names no dropout leaves BERT's 0.1.
  assert config == {
    **json.loads(helpers.GOLDEN_CONFIG.read_text()),
    "attention_probs_dropout_prob": 0.1,
    "hidden_dropout_prob": 0.1,
  }


@pytest.mark.parametrize(
  "name",
  ["blip_base", "blip_decoder", "blip_itm", "blip_pretrain", "blip_vqa"],
)
def test_a_folder_of_the_original_says_how_many_heads_there_are(tmp_path, name):
  """The shapes of the weights do not, for sizes that are not published."""
  checkpoint = helpers.open_golden(name)
  folder = write.write(checkpoint, tmp_path / "out", "original")
  assert json.loads((folder / "vit.json").read_text()) == {
    "image_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 4,
  }
  again = opening.open_checkpoint(folder).card.config
  assert (again.vit.num_heads, again.med.num_heads) == (4, 4)
  assert again.embed_dim == checkpoint.card.config.embed_dim


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_other_layouts_have_square_images(tmp_path, layout):
  """16 x 64 pixels have as many patches as 32 x 32."""
  checkpoint = helpers.open_golden("blip_itm")
  config = checkpoint.card.config
  vit = dataclasses.replace(config.vit, image_size=(16, 64))
  config = dataclasses.replace(config, vit=vit)
  card = dataclasses.replace(checkpoint.card, config=config)
  checkpoint = dataclasses.replace(checkpoint, card=card)
  with pytest.raises(ValueError, match=r"16 x 64.*--layout orbax"):
    write.write(checkpoint, tmp_path / "out", layout)
  assert not list(tmp_path.iterdir())


def test_heads_that_a_file_of_weights_does_not_say_give_a_warning(
  tmp_path, caplog
):
  with caplog.at_level(logging.WARNING):
    path = write.write(
      helpers.open_golden("blip_itm"), tmp_path / "out.pth", "original"
    )
  assert "numbers of attention heads, 4 and 4, are not in this" in caplog.text
  with pytest.raises(ValueError, match="--model-config"):
    opening.open_checkpoint(path)
  caplog.clear()
  write._warn_of_missing(path, published_card(num_heads=12))
  assert not caplog.text
  write._warn_of_missing(path, published_card(num_heads=6))
  assert "12 and 6" in caplog.text


@pytest.mark.parametrize(
  "layout, prompt, generation, lost",
  [
    ("hf", "a picture of ", {}, "prompt='a picture of ': give it again"),
    ("hf", "", {"num_beams": 7}, None),
    ("original", "a picture of ", {}, None),
    ("original", "", {}, "prompt='': give it again"),
    ("original", "b ", {"num_beams": 7}, "prompt='b ', num_beams=7: give them"),
    ("orbax", "b ", {"num_beams": 7}, None),
  ],
)
def test_what_a_layout_cannot_say_of_generating_gives_a_warning(
  layout, prompt, generation, lost, tmp_path, caplog
):
  captioner = helpers.open_golden("blip_decoder")
  card = dataclasses.replace(
    captioner.card,
    prompt=prompt,
    generation={**captioner.card.generation, **generation},
  )
  with caplog.at_level(logging.WARNING):
    write.write(
      dataclasses.replace(captioner, card=card), tmp_path / "out", layout
    )
  if lost:
    assert lost in caplog.text
  else:
    assert "no place for" not in caplog.text
    again = opening.open_checkpoint(tmp_path / "out").card
    assert (again.prompt, again.generation) == (prompt, card.generation)


def published_card(num_heads):
  config = config_lib.variant(
    "base", image_size=384, vocab_size=30524, tokens=config_lib.SpecialTokens()
  )
  med = dataclasses.replace(config.med, num_heads=num_heads)
  return card_lib.Card("itm", dataclasses.replace(config, med=med))


@pytest.mark.parametrize(
  "family, name",
  [
    ("caption", "BlipForConditionalGeneration"),
    ("vqa", "BlipForQuestionAnswering"),
    ("itm", "BlipForImageTextRetrieval"),
  ],
)
def test_the_config_of_hugging_face(family, name):
  """What BlipConfig and its two parts call the sizes; heads and epsilon are
  those that BLIP was trained with, not transformers' defaults."""
  config = dataclasses.replace(
    helpers.BLIP, med=dataclasses.replace(helpers.MED, dropout=0.1)
  )
  assert write._hf_config(card_lib.Card(family, config)) == {
    "architectures": [name],
    "model_type": "blip",
    "image_text_hidden_size": 32,
    "label_smoothing": 0.1,
    "tie_word_embeddings": True,
    "vision_config": {
      "model_type": "blip_vision_model",
      "attention_dropout": 0.0,
      "hidden_act": "gelu",
      "hidden_size": 48,
      "image_size": 32,
      "intermediate_size": 192,
      "layer_norm_eps": 1e-6,
      "num_attention_heads": 4,
      "num_hidden_layers": 2,
      "patch_size": 8,
    },
    "text_config": {
      "model_type": "blip_text_model",
      "attention_probs_dropout_prob": 0.1,
      "bos_token_id": 422,
      "encoder_hidden_size": 48,
      "eos_token_id": 3,
      "hidden_act": "gelu",
      "hidden_dropout_prob": 0.1,
      "hidden_size": 64,
      "intermediate_size": 256,
      "is_decoder": True,
      "label_smoothing": 0.1,
      "layer_norm_eps": 1e-12,
      "max_position_embeddings": 64,
      "num_attention_heads": 4,
      "num_hidden_layers": 2,
      "pad_token_id": 0,
      "sep_token_id": 3,
      "vocab_size": 424,
    },
  }


@pytest.mark.parametrize(
  "name, has_generation", [("blip_decoder", True), ("blip_itm", False)]
)
def test_the_files_of_a_hugging_face_folder(tmp_path, name, has_generation):
  folder = write.write(helpers.open_golden(name), tmp_path / "hf", "hf")
  names = {path.name for path in folder.iterdir()}
  assert {"config.json", "model.safetensors", "vocab.txt"} <= names
  assert "model.json" not in names
  assert ("generation_config.json" in names) == has_generation
  if has_generation:
    text = (folder / "generation_config.json").read_text()
    assert json.loads(text) == {
      "bos_token_id": 422,
      "eos_token_id": 3,
      "pad_token_id": 0,
      "num_beams": 3,
      "max_length": 20,
      "min_length": 5,
      "repetition_penalty": 1.0,
    }


def test_an_existing_path_and_a_file_of_another_layout_are_refused(tmp_path):
  checkpoint = helpers.open_golden("blip_decoder")
  with pytest.raises(ValueError, match="exists already"):
    write.write(checkpoint, tmp_path, "hf")
  for layout in ("orbax", "hf"):
    with pytest.raises(ValueError, match="only --layout original"):
      write.write(checkpoint, tmp_path / "out.pth", layout)
  with pytest.raises(ValueError, match="layout: expected one of"):
    write.write(checkpoint, tmp_path / "out", "torch")
  assert not list(tmp_path.iterdir())
