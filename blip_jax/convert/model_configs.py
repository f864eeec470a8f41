"""Model configs of checkpoints: from the shapes of weights, and config files.

Shapes determine everything except the number of attention heads. It follows
from the published widths of BERT and ViT; for other widths a config file must
give it. Where a config file and the shapes overlap, they must agree.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

from blip_jax.convert.weights import Leaves
from blip_jax.models import card as card_lib
from blip_jax.models import config as model_config
from blip_jax.runtime import json_files

# Width of an attention head in all published towers.
HEAD_WIDTH = 64
PUBLISHED_WIDTHS = (768, 1024)
BERT_VOCAB = 30524

# Types of the values in files, by key, as `json_files` writes them.
_SIZE = range(1, 1 << 20)
_COUNT = range(1 << 20)
_ID = range(1 << 31)
_EXTERNAL_TOWER = {
  "hidden_size": _SIZE,
  "num_hidden_layers": _SIZE,
  "num_attention_heads": _SIZE,
  "intermediate_size": _SIZE,
  "max_position_embeddings": _SIZE,
  "patch_size": _SIZE,
  "embed_dim": _SIZE,
  "depth": _SIZE,
  "num_heads": _SIZE,
  "hidden_act": str,
  "layer_norm_eps": float,
  "pad_token_id": (_ID, None),
  "sep_token_id": (_ID, None),
  "bos_token_id": (_ID, None),
}
_NATIVE_TOWER = {
  "vocab_size": _ID,
  "width": _SIZE,
  "depth": _SIZE,
  "num_heads": _SIZE,
  "mlp_dim": _SIZE,
  "max_positions": _SIZE,
  "patch_size": _SIZE,
  "image_size": [_SIZE, _SIZE],
  "drop_path": float,
  "dropout": float,
  "init_std": float,
  "pos_embed_std": float,
  "remat": set(model_config.REMAT_POLICIES),
  "dtype": {"float32", "bfloat16", "float16"},
  "attention": set(model_config.ATTENTION),
  "images_at_once": _COUNT,
  "tokens": {name: _ID for name in ("pad", "cls", "sep", "dec", "enc")},
}
GENERATION = {
  "max_length": (_SIZE, None),
  "max_new_tokens": (_SIZE, None),
  "min_length": (_COUNT, None),
  "min_new_tokens": (_COUNT, None),
  "num_beams": (_SIZE, None),
  "num_return_sequences": (_SIZE, None),
  "repetition_penalty": (float, None),
  "no_repeat_ngram_size": (_COUNT, None),
  "temperature": (float, None),
  "top_k": (_COUNT, None),
  "top_p": (float, None),
  "do_sample": (bool, None),
  "sample": bool,
  "length_norm": str,
}
CARD = {
  "family": str,
  "prompt": str,
  "source": str,
  "generation": GENERATION,
  "config": {"vit": _NATIVE_TOWER, "med": _NATIVE_TOWER, "embed_dim": _SIZE},
}
_CONFIG = {
  **CARD,
  **_EXTERNAL_TOWER,
  "vision_config": _EXTERNAL_TOWER,
  "text_config": _EXTERNAL_TOWER,
  "vit": _EXTERNAL_TOWER,
  "text": _EXTERNAL_TOWER,
  "image_text_hidden_size": _SIZE,
}


@dataclasses.dataclass
class Hints:
  """What a config file says, under native names; the rest is absent.

  Attributes:
    vit: fields of `models.config.ViTConfig`.
    med: fields of `models.config.MedConfig`.
    tokens: fields of `models.config.SpecialTokens`.
    embed_dim: width of the ITC space; None if unknown.
    warnings: values of the file that were replaced, and why.
    source: the file.
  """

  vit: dict[str, Any] = dataclasses.field(default_factory=dict)
  med: dict[str, Any] = dataclasses.field(default_factory=dict)
  tokens: dict[str, int] = dataclasses.field(default_factory=dict)
  embed_dim: int | None = None
  warnings: list[str] = dataclasses.field(default_factory=list)
  source: str = ""


def read_file(path: str | os.PathLike) -> Hints:
  """Reads a native or external model config from a file.

  Raises:
    ValueError: as `read_hints`; names the file and the key.
  """
  value = json_files.read(path, _CONFIG)
  try:
    hints = read_hints(value)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  hints.source = os.fspath(path)
  return hints


def read_card(path: str | os.PathLike) -> card_lib.Card:
  """Reads a native `model.json`.

  Raises:
    ValueError: it describes no model; names the file and the key.
  """
  value = json_files.read(path, CARD)
  try:
    return card_lib.Card.from_json(value)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def read_hints(value: Mapping[str, Any]) -> Hints:
  """Reads a native or external model config.

  Args:
    value: the content of a native `model.json`, of Hugging Face's
      `config.json`, of the original's `med_config.json`, or
      `{"vit": ..., "text": ...}` with the original's keys.

  Raises:
    ValueError: it is none of these, or its activation is not BLIP's.
  """
  if "config" in value and "family" in value:
    return _from_native(card_lib.Card.from_json(value).config)
  if "vision_config" in value and "text_config" in value:
    return _from_hf(value)
  if "vit" in value and "text" in value:
    return Hints(
      _renamed(value["vit"], _ORIGINAL_VIT),
      _renamed(value["text"], _BERT),
      embed_dim=value.get("embed_dim"),
    )
  if "hidden_size" in value:
    return Hints(med=_renamed(value, _BERT))
  if "embed_dim" in value and "depth" in value:
    return Hints(_renamed(value, _ORIGINAL_VIT))
  raise ValueError(
    "not a model config: expected the model.json of this project, "
    "Hugging Face's config.json, the original's med_config.json, or "
    f"{{'vit': ..., 'text': ...}}; found the keys {sorted(value)[:10]}"
  )


# External name -> native name.
_BERT = {
  "hidden_size": "width",
  "num_hidden_layers": "depth",
  "num_attention_heads": "num_heads",
  "intermediate_size": "mlp_dim",
  "max_position_embeddings": "max_positions",
}
_HF_VIT = {
  "hidden_size": "width",
  "num_hidden_layers": "depth",
  "num_attention_heads": "num_heads",
  "intermediate_size": "mlp_dim",
  "patch_size": "patch_size",
}
_ORIGINAL_VIT = {
  "embed_dim": "width",
  "depth": "depth",
  "num_heads": "num_heads",
  "patch_size": "patch_size",
}


def _renamed(
  value: Mapping[str, Any], table: Mapping[str, str]
) -> dict[str, Any]:
  return {
    native: value[name] for name, native in table.items() if name in value
  }


def _from_native(config: model_config.BlipConfig) -> Hints:
  vit, med = dataclasses.asdict(config.vit), dataclasses.asdict(config.med)
  tokens = med.pop("tokens")
  del vit["image_size"], med["vocab_size"]
  return Hints(vit, med, tokens, config.embed_dim)


def _from_hf(value: Mapping[str, Any]) -> Hints:
  """Reads what the weights need, and corrects values BLIP never used."""
  vision, text = value["vision_config"], value["text_config"]
  hints = Hints(
    _renamed(vision, _HF_VIT),
    _renamed(text, _BERT),
    # transformers' default, which a file may omit.
    embed_dim=value.get("image_text_hidden_size", 256),
  )
  for tower in (vision, text):
    if tower.get("hidden_act", "gelu") != "gelu":
      raise ValueError(
        f"hidden_act: expected 'gelu', found {tower['hidden_act']!r}; BLIP was "
        "trained with no other"
      )
  names = {"pad_token_id": "pad", "sep_token_id": "sep", "bos_token_id": "dec"}
  tokens = _renamed(text, names)
  hints.tokens = {name: id for name, id in tokens.items() if id is not None}
  width, heads = (
    text.get("hidden_size", 768),
    text.get("num_attention_heads", 8),
  )
  if width in PUBLISHED_WIDTHS and heads != width // HEAD_WIDTH:
    hints.warnings.append(
      f"text_config.num_attention_heads is {heads} (transformers' default, "
      "which no shape contradicts); replaced by the "
      f"{width // HEAD_WIDTH} that BLIP was trained with"
    )
    heads = width // HEAD_WIDTH
  hints.med["num_heads"] = heads
  eps = vision.get("layer_norm_eps", 1e-5)
  if eps != 1e-6:
    hints.warnings.append(
      f"vision_config.layer_norm_eps is {eps}; replaced by the 1e-06 that "
      "BLIP was trained with"
    )
  eps = text.get("layer_norm_eps", 1e-12)
  if eps != 1e-12:
    hints.warnings.append(
      f"text_config.layer_norm_eps is {eps}; replaced by the 1e-12 that "
      "BLIP was trained with"
    )
  return hints


def from_shapes(
  leaves: Leaves, family: str, hints: Hints
) -> model_config.BlipConfig:
  """The config of a model with these weights.

  Args:
    leaves: native leaves.
    family: of the model that will be built, which decides drop path.
    hints: of config files.

  Raises:
    ValueError: weights and hints contradict each other, or neither determines
      the number of heads.
  """
  shape = lambda path: leaves[f"params/{path}"].shape
  for path in ("visual_encoder/pos_embed", "visual_encoder/patch_embed/kernel"):
    if f"params/{path}" not in leaves:
      raise ValueError(
        f"the weights lack {path}: this is not a BLIP model, or only a part "
        "of one"
      )
  patch_size, _, _, width = shape("visual_encoder/patch_embed/kernel")
  positions = shape("visual_encoder/pos_embed")[1]
  side = math.isqrt(positions - 1)
  if side * side + 1 != positions:
    raise ValueError(
      f"visual_encoder/pos_embed: expected the positions of [CLS] and a square "
      f"grid of patches, found {positions} positions; only models for square "
      "images can be converted"
    )
  vit = _with_hints(
    "image tower",
    dict(
      patch_size=patch_size,
      width=width,
      depth=_depth(leaves, "params/visual_encoder", "blocks"),
      mlp_dim=shape("visual_encoder/blocks/fc_in/kernel")[2],
    ),
    hints.vit,
    hints.source,
  )
  tower = "text_encoder"
  if f"params/{tower}/word_embeddings" not in leaves:
    tower = "text_decoder"
  vocab_size, text_width = shape(f"{tower}/word_embeddings")
  med = _with_hints(
    "text tower",
    dict(
      width=text_width,
      depth=_depth(leaves, f"params/{tower}", "layers", "merging_layers"),
      mlp_dim=shape(f"{tower}/layers/fc_in/kernel")[2],
      max_positions=shape(f"{tower}/position_embeddings")[0],
    ),
    hints.med,
    hints.source,
  )
  vit.setdefault("drop_path", _drop_path(family, width))
  embed_dim = hints.embed_dim or 256
  if "params/vision_proj/kernel" in leaves:
    stored = shape("vision_proj/kernel")[1]
    if hints.embed_dim not in (None, stored):
      raise _contradiction("embed_dim", hints.embed_dim, stored, hints.source)
    embed_dim = stored
  return model_config.BlipConfig(
    model_config.ViTConfig(
      image_size=(side * patch_size, side * patch_size), **vit
    ),
    model_config.MedConfig(
      vocab_size=vocab_size,
      tokens=default_tokens(vocab_size, hints.tokens),
      **med,
    ),
    embed_dim,
  )


def default_tokens(
  vocab_size: int, known: Mapping[str, int]
) -> model_config.SpecialTokens:
  """Special tokens: known ids, else BERT's, and BLIP's two as the last ids."""
  added = {"dec": vocab_size - 2, "enc": vocab_size - 1}
  return model_config.SpecialTokens(**{**added, **known})


def _with_hints(
  tower: str, shapes: Mapping[str, int], hints: Mapping[str, Any], source: str
) -> dict[str, Any]:
  for name, size in shapes.items():
    if hints.get(name, size) != size:
      raise _contradiction(f"{name} of the {tower}", hints[name], size, source)
  sizes = {**hints, **shapes}
  if "num_heads" not in sizes:
    if shapes["width"] not in PUBLISHED_WIDTHS:
      raise ValueError(
        f"the {tower} has width {shapes['width']}, and neither its shapes nor "
        f"{source or 'a config file'} say its number of attention heads; give "
        "a config with --model-config (model_config=)"
      )
    sizes["num_heads"] = shapes["width"] // HEAD_WIDTH
  if shapes["width"] % sizes["num_heads"]:
    raise ValueError(
      f"in the config {source}: expected a number of attention heads of the "
      f"{tower} that divides its width, {shapes['width']}, found "
      f"{sizes['num_heads']}; give the config of these weights with "
      "--model-config (model_config=)"
    )
  return sizes


def _contradiction(
  name: str, configured: Any, stored: Any, source: str
) -> ValueError:
  return ValueError(
    f"in the config {source}: {name} is {configured}, in the weights it is "
    f"{stored}; give the config of these weights with --model-config "
    "(model_config=)"
  )


def _depth(leaves: Leaves, tower: str, *stacks: str) -> int:
  """The number of layers of a tower, in one or more stacks."""
  paths = [f"{tower}/{name}/fc_in/kernel" for name in stacks]
  depth = sum(leaves[path].shape[0] for path in paths if path in leaves)
  if not depth:
    raise ValueError(f"the weights have no layers: nothing under {paths[0]}")
  return depth


def _drop_path(family: str, width: int) -> float:
  """The original's rate in training: for ViT-L, and for VQA and NLVR."""
  return 0.1 if width == 1024 or family in ("vqa", "nlvr") else 0.0
