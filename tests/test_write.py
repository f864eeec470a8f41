"""Checkpoints are written completely or not at all."""

import pytest

from blip_jax.convert import write
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
