"""Model configs from shapes and from config files."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from blip_jax.convert import model_configs, opening, weights
from blip_jax.models import config, families
from blip_jax.runtime import saved_arrays
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


def leaves_of(variant, family, image_size=224, **med):
  """The leaves of a model of full size, whose arrays take no memory."""
  sizes = config.variant(
    variant,
    image_size=image_size,
    vocab_size=30524,
    tokens=config.SpecialTokens(),
    med=med,
  )
  shapes = saved_arrays.by_path({"params": families.abstract(family, sizes)})
  return {
    path: weights.Leaf(x.shape, np.dtype(x.dtype), lambda: None)
    for path, x in shapes.items()
  }


@pytest.mark.parametrize(
  "variant, family, image_size, drop_path",
  [
    ("base", "caption", 384, 0.0),
    ("base", "pretrain", 224, 0.0),
    ("base", "feature", 224, 0.0),
    ("base", "retrieval", 384, 0.0),
    ("base", "vqa", 480, 0.1),
    ("base", "nlvr", 384, 0.1),
    ("large", "caption", 384, 0.1),
    ("large", "retrieval", 384, 0.1),
  ],
)
def test_published_models_follow_from_their_shapes(
  variant, family, image_size, drop_path
):
  """ViT-B/16 and ViT-L/16, BERT-base, and the original's drop path."""
  leaves = leaves_of(variant, family, image_size)
  found = model_configs.from_shapes(leaves, family, model_configs.Hints())
  sizes = {
    "base": dict(width=768, depth=12, num_heads=12, mlp_dim=3072),
    "large": dict(width=1024, depth=24, num_heads=16, mlp_dim=4096),
  }
  assert found.vit == config.ViTConfig(
    image_size=(image_size, image_size),
    patch_size=16,
    drop_path=drop_path,
    **sizes[variant],
  )
  assert found.med == config.MedConfig(
    vocab_size=30524, max_positions=512, **sizes["base"]
  )
  assert found.embed_dim == 256
  tokens = found.med.tokens
  assert (tokens.pad, tokens.cls, tokens.sep) == (0, 101, 102)
  assert (tokens.dec, tokens.enc) == (30522, 30523)


def test_numbers_of_heads_of_a_config_file_win_over_the_published_ones():
  hints = model_configs.Hints(vit={"num_heads": 6}, med={"num_heads": 24})
  leaves = leaves_of("base", "caption")
  found = model_configs.from_shapes(leaves, "caption", hints)
  assert (found.vit.num_heads, found.med.num_heads) == (6, 24)


def test_the_dropped_paths_of_a_config_file_win():
  hints = model_configs.Hints(vit={"drop_path": 0.3})
  leaves = leaves_of("large", "vqa")
  found = model_configs.from_shapes(leaves, "vqa", hints)
  assert found.vit.drop_path == 0.3


@pytest.mark.parametrize(
  "family, hint, found",
  [
    ("retrieval", None, 256),
    ("retrieval", 256, 256),
    ("retrieval", 64, "embed_dim is 64, in the weights it is 256"),
    # Without projections only a config knows; BLIP's is 256.
    ("caption", None, 256),
    ("caption", 64, 64),
  ],
)
def test_the_width_of_the_joint_space(family, hint, found):
  hints = model_configs.Hints(embed_dim=hint)
  leaves = leaves_of("base", family)
  if isinstance(found, str):
    with pytest.raises(ValueError, match=found):
      model_configs.from_shapes(leaves, family, hints)
  else:
    sizes = model_configs.from_shapes(leaves, family, hints)
    assert sizes.embed_dim == found


def test_impossible_shapes_are_refused():
  leaves = leaves_of("base", "caption")
  pos_embed = "params/visual_encoder/pos_embed"
  for number, message in ((197, None), (198, "198 positions"), (196, "196 ")):
    leaf = weights.Leaf((1, number, 768), np.dtype("f4"), lambda: None)
    changed = {**leaves, pos_embed: leaf}
    if message is None:
      model_configs.from_shapes(changed, "caption", model_configs.Hints())
      continue
    with pytest.raises(ValueError, match=message):
      model_configs.from_shapes(changed, "caption", model_configs.Hints())
  for lacking in (pos_embed, "params/visual_encoder/patch_embed/kernel"):
    rest = {path: leaf for path, leaf in leaves.items() if path != lacking}
    with pytest.raises(ValueError, match="this is not a BLIP model"):
      model_configs.from_shapes(rest, "caption", model_configs.Hints())
  blocks = {p: x for p, x in leaves.items() if "/blocks/" not in p}
  with pytest.raises(ValueError, match=r"no layers: nothing under .*blocks"):
    model_configs.from_shapes(blocks, "caption", model_configs.Hints())


def hugging_face(vision=(), text=(), **more):
  return {
    "vision_config": {"layer_norm_eps": 1e-6, **dict(vision)},
    "text_config": {"num_attention_heads": 12, **dict(text)},
    **more,
  }


@pytest.mark.parametrize(
  "value, heads, num_warnings",
  [
    (hugging_face(), 12, 0),
    (hugging_face(text={"num_attention_heads": 8}), 12, 1),
    (hugging_face(text={"hidden_size": 1024}), 16, 1),
    (
      hugging_face(text={"hidden_size": 1024, "num_attention_heads": 16}),
      16,
      0,
    ),
    # Another width: nobody knows better than the file.
    (hugging_face(text={"hidden_size": 32, "num_attention_heads": 4}), 4, 0),
    (hugging_face(vision={"layer_norm_eps": 1e-5}), 12, 1),
    (hugging_face(text={"layer_norm_eps": 1e-12}), 12, 0),
    (hugging_face(text={"layer_norm_eps": 1e-5}), 12, 1),
  ],
)
def test_values_that_blip_never_used_are_replaced(value, heads, num_warnings):
  hints = model_configs.read_hints(value)
  assert hints.med["num_heads"] == heads
  assert len(hints.warnings) == num_warnings


def test_a_hugging_face_config_is_read():
  value = hugging_face(
    vision=dict(
      hidden_size=1024,
      num_hidden_layers=24,
      num_attention_heads=16,
      intermediate_size=4096,
      patch_size=16,
      image_size=384,
    ),
    text=dict(
      num_hidden_layers=12,
      intermediate_size=3072,
      max_position_embeddings=512,
      pad_token_id=0,
      sep_token_id=102,
      bos_token_id=30522,
    ),
    image_text_hidden_size=128,
  )
  hints = model_configs.read_hints(value)
  assert hints.vit == dict(
    width=1024, depth=24, num_heads=16, mlp_dim=4096, patch_size=16
  )
  assert hints.med == dict(
    depth=12, num_heads=12, mlp_dim=3072, max_positions=512
  )
  assert hints.tokens == dict(pad=0, sep=102, dec=30522)
  assert hints.embed_dim == 128
  del value["image_text_hidden_size"]
  assert model_configs.read_hints(value).embed_dim == 256
  value["text_config"]["hidden_act"] = "gelu_new"
  with pytest.raises(ValueError, match="found 'gelu_new'"):
    model_configs.read_hints(value)


def test_configs_of_the_original_are_read():
  vit = {"embed_dim": 48, "depth": 2, "num_heads": 4, "patch_size": 8}
  text = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 424}
  native = dict(width=48, depth=2, num_heads=4, patch_size=8)
  both = model_configs.read_hints({"vit": vit, "text": text, "embed_dim": 7})
  assert (both.vit, both.med) == (native, dict(width=64, num_heads=4))
  assert both.embed_dim == 7
  assert model_configs.read_hints({"vit": vit, "text": text}).embed_dim is None
  alone = model_configs.read_hints(vit)
  assert (alone.vit, alone.med) == (native, {})
  alone = model_configs.read_hints(text)
  assert (alone.vit, alone.med) == ({}, dict(width=64, num_heads=4))


def test_the_tokens_of_blip_are_the_last_two_of_its_vocabulary():
  tokens = model_configs.default_tokens(1000, {})
  assert (tokens.dec, tokens.enc) == (998, 999)
  assert (tokens.pad, tokens.cls, tokens.sep) == (0, 101, 102)
  tokens = model_configs.default_tokens(1000, {"dec": 5, "sep": 3})
  assert (tokens.dec, tokens.enc, tokens.sep) == (5, 999, 3)


def test_the_schema_of_a_card_has_every_field_of_a_tower():
  known = model_configs.CARD["config"]
  for name, kind in (("vit", config.ViTConfig), ("med", config.MedConfig)):
    fields = {field.name for field in dataclasses.fields(kind)}
    assert fields <= known[name].keys(), name
