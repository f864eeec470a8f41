"""The command line that converts checkpoints."""

import json

import numpy as np
import pytest
from blip_jax.tools import convert_checkpoint

from blip_jax.convert import opening, reader
from tests import helpers

CHECKPOINTS = ("blip_base", "blip_decoder", "blip_nlvr_deep", "blip_pretrain")
FLAGS = (
  "--model-config",
  helpers.GOLDEN_CONFIG,
  "--tokenizer",
  helpers.GOLDEN_TOKENIZER,
)


def convert(*args):
  return convert_checkpoint.main([str(arg) for arg in args])


def config_of(name):
  deep = helpers.GOLDEN / "configs" / "med_config_nlvr_deep.json"
  return deep if name == "blip_nlvr_deep" else helpers.GOLDEN_CONFIG


def assert_same_state(path, other):
  a, b = reader.read(path), reader.read(other)
  assert set(a) == set(b)
  for name in a:
    assert a.dtype(name) == b.dtype(name), name
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_round_trip_is_bit_equal(tmp_path, capsys, name):
  """From the original's layout to the native one and back."""
  native, back = tmp_path / "native", tmp_path / "back"
  flags = (
    "--model-config",
    config_of(name),
    "--tokenizer",
    helpers.GOLDEN_TOKENIZER,
  )
  assert convert(helpers.golden_checkpoint(name), native, *flags) == 0
  printed = capsys.readouterr().out
  assert "missing: 0" in printed and "unexpected: 0" in printed
  # Companion files give the config and the vocabulary from here on.
  assert convert(native, back, "--layout", "original") == 0
  assert_same_state(helpers.golden_checkpoint(name), back / "model.pth")
  assert json.loads((back / "med_config.json").read_text())["vocab_size"] == 424
  assert (back / "vocab.txt").exists()
  assert not list(tmp_path.glob(".*"))


def test_round_trip_through_hugging_face(tmp_path):
  hf, native, back = (tmp_path / name for name in ("hf", "native", "back"))
  assert (
    convert(
      helpers.golden_checkpoint("blip_decoder"), hf, "--layout", "hf", *FLAGS
    )
    == 0
  )
  assert convert(hf, native) == 0
  assert convert(native, back, "--layout", "original") == 0
  assert_same_state(
    helpers.golden_checkpoint("blip_decoder"), back / "model.pth"
  )
  config = json.loads((hf / "config.json").read_text())
  assert config["architectures"] == ["BlipForConditionalGeneration"]
  assert config["text_config"]["num_attention_heads"] == 4
  size = json.loads((hf / "preprocessor_config.json").read_text())["size"]
  assert size == {"height": 32, "width": 32}


def test_the_original_layout_may_be_one_file(tmp_path):
  path = tmp_path / "model.pth"
  assert (
    convert(
      helpers.golden_checkpoint("blip_decoder"),
      path,
      "--layout",
      "original",
      *FLAGS,
    )
    == 0
  )
  assert_same_state(helpers.golden_checkpoint("blip_decoder"), path)


def lose(state):
  del state["visual_encoder.norm.bias"]


def add(state):
  state["text_decoder.bert.pooler.dense.weight"] = np.zeros(2, np.float32)


def bend(state):
  name = "text_decoder.bert.encoder.layer.1.output.dense.weight"
  state[name] = state[name][:-1]


def shorten_tied(state):
  name = "text_decoder.cls.predictions.decoder.bias"
  state[name] = state[name][:-1]


def rename_all(state):
  for name in list(state):
    state[f"teacher.{name}"] = state.pop(name)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lose, r"- params/visual_encoder/ln_post/bias"),
    (add, r"no BLIP model has: text_decoder\.bert\.pooler\.dense\.weight"),
    (bend, r"layers/fc_out/kernel: layer 1 has shape \(256, 63\), and layer 0"),
    (shorten_tied, r"shapes differ"),
    (rename_all, r"none of its 94 names .* teacher\.visual_encoder"),
  ],
)
def test_invalid_checkpoints_are_refused(tmp_path, capsys, change, message):
  path = helpers.save_changed(tmp_path, change)
  with pytest.raises(ValueError, match=message):
    opening.open_checkpoint(path, **helpers.OPEN_GOLDEN)
  assert convert(path, tmp_path / "out", *FLAGS) == 1
  assert capsys.readouterr().err.startswith("error: ")
  assert not (tmp_path / "out").exists()


def test_existing_files_are_not_overwritten(tmp_path, capsys):
  (tmp_path / "mine").write_text("precious")
  source = helpers.golden_checkpoint("blip_decoder")
  assert convert(source, tmp_path / "mine", *FLAGS) == 1
  assert "exists already" in capsys.readouterr().err
  assert (tmp_path / "mine").read_text() == "precious"
