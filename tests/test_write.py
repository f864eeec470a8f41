"""Checkpoints are written completely or not at all."""

import json
import logging

import numpy as np
import pytest

from blip_jax.convert import opening, write
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
  config = None if layout == "orbax" else helpers.GOLDEN_CONFIG
  again = opening.open_checkpoint(tmp_path / "out", model_config=config)
  texts = ["a zorkon", "a red circle"]
  ids, _ = again.tokenizer.encode(texts, 6)
  np.testing.assert_array_equal(ids, extended.tokenizer.encode(texts, 6)[0])
  assert again.tokenizer.pieces(ids[:, 2].tolist()) == ["zorkon", "red circle"]


def test_a_file_of_weights_alone_has_no_vocabulary(tmp_path, extended, caplog):
  with caplog.at_level(logging.WARNING):
    write.write(extended, tmp_path / "out.pth", "original")
  assert "vocabulary of 424 tokens is not in this file" in caplog.text
