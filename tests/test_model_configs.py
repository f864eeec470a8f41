"""Model configs from shapes and from config files."""

import json
import shutil

import pytest

from blip_jax.convert import model_configs, opening
from tests import helpers


def test_unpublished_widths_need_the_number_of_heads():
  with pytest.raises(
    ValueError,
    match=r"has width 48, .* number of attention heads; .*--model-config",
  ):
    opening.open_checkpoint(
      helpers.golden_checkpoint("blip_decoder"),
      tokenizer=helpers.GOLDEN_TOKENIZER,
    )


def test_a_config_of_another_model_is_refused(tmp_path):
  config = json.loads(helpers.GOLDEN_CONFIG.read_text())
  shutil.copy(helpers.GOLDEN / "configs" / "vit.json", tmp_path)
  path = tmp_path / "med_config.json"
  path.write_text(json.dumps({**config, "num_hidden_layers": 3}))
  with pytest.raises(
    ValueError, match=r"depth of the text tower is 3, in the weights it is 2"
  ):
    opening.open_checkpoint(
      helpers.golden_checkpoint("blip_decoder"),
      model_config=path,
      tokenizer=helpers.GOLDEN_TOKENIZER,
    )
  path.write_text("[")
  with pytest.raises(ValueError, match=r"med_config\.json: cannot be read"):
    opening.open_checkpoint(
      helpers.golden_checkpoint("blip_decoder"), model_config=path
    )
  path.write_text('{"some": "thing"}')
  with pytest.raises(ValueError, match=r"not a model config"):
    opening.open_checkpoint(
      helpers.golden_checkpoint("blip_decoder"), model_config=path
    )


def test_wrong_values_in_hugging_face_configs_are_replaced():
  """Text heads 8, image epsilon 1e-5: defaults that no shape contradicts."""
  hints = model_configs.read_hints(
    {"vision_config": {"hidden_size": 768}, "text_config": {"vocab_size": 9}}
  )
  assert hints.med["num_heads"] == 12
  heads, epsilon = hints.warnings
  assert "num_attention_heads is 8" in heads and "12" in heads
  assert "layer_norm_eps is 1e-05" in epsilon and "1e-06" in epsilon
  with pytest.raises(ValueError, match="hidden_act: expected 'gelu'"):
    model_configs.read_hints(
      {"vision_config": {"hidden_act": "relu"}, "text_config": {}}
    )
