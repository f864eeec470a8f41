"""How large a model is: from the shapes of its weights, and from config files.

Shapes tell all but the number of heads, which a config file must give where the
width is none of BERT's or ViT's; where both speak, they must agree.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from blip_jax.convert.weights import Leaves
from blip_jax.models import card as card_lib
from blip_jax.models import config as model_config

# Of all published towers.
HEAD_WIDTH = 64
PUBLISHED_WIDTHS = (768, 1024)
BERT_VOCAB = 30524


@dataclasses.dataclass
class Hints:
  """What a config file says, in our words; what it does not say is absent."""

  vit: dict[str, Any] = dataclasses.field(default_factory=dict)
  med: dict[str, Any] = dataclasses.field(default_factory=dict)
  tokens: dict[str, int] = dataclasses.field(default_factory=dict)
  embed_dim: int | None = None
  warnings: list[str] = dataclasses.field(default_factory=list)


def read_hints(value: Mapping[str, Any]) -> Hints:
  """Reads a config: ours (`model.json`), Hugging Face's `config.json`, the
  original's `med_config.json`, or `{"vit": ..., "text": ...}` of the latter.

  Raises:
    ValueError: it is none of these.
  """
  if "config" in value and "family" in value:
    return _from_ours(card_lib.Card.from_json(value).config)
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
    "not a model config: expected our model.json, Hugging Face's config.json, "
    "the original's med_config.json, or {'vit': ..., 'text': ...}; found the "
    f"keys {sorted(value)[:10]}"
  )


# Their name of a number -> ours.
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


def _renamed(value, table):
  return {ours: value[name] for name, ours in table.items() if name in value}


def _from_ours(config: model_config.BlipConfig) -> Hints:
  vit, med = dataclasses.asdict(config.vit), dataclasses.asdict(config.med)
  tokens = med.pop("tokens")
  del vit["image_size"], med["vocab_size"]
  return Hints(vit, med, tokens, config.embed_dim)


def _from_hf(value: Mapping[str, Any]) -> Hints:
  """Takes what the weights need, and says where their config is a trap."""
  vision, text = value["vision_config"], value["text_config"]
  hints = Hints(
    _renamed(vision, _HF_VIT),
    _renamed(text, _BERT),
    # In transformers' defaults, which a file may leave unsaid.
    embed_dim=value.get("image_text_hidden_size", 256),
  )
  for tower in (vision, text):
    if tower.get("hidden_act", "gelu") != "gelu":
      raise ValueError(
        f"hidden_act: expected 'gelu', found {tower['hidden_act']!r}; BLIP was "
        "trained with no other"
      )
  names = {"pad_token_id": "pad", "sep_token_id": "sep", "bos_token_id": "dec"}
  hints.tokens = _renamed(text, names)
  width, heads = (
    text.get("hidden_size", 768),
    text.get("num_attention_heads", 8),
  )
  if width in PUBLISHED_WIDTHS and heads != width // HEAD_WIDTH:
    hints.warnings.append(
      f"text_config.num_attention_heads is {heads} (a default of transformers "
      f"that no shape betrays); set to the {width // HEAD_WIDTH} that BLIP was "
      "trained with"
    )
    heads = width // HEAD_WIDTH
  hints.med["num_heads"] = heads
  eps = vision.get("layer_norm_eps", 1e-5)
  if eps != 1e-6:
    hints.warnings.append(
      f"vision_config.layer_norm_eps is {eps}; set to the 1e-06 that BLIP was "
      "trained with"
    )
  eps = text.get("layer_norm_eps", 1e-12)
  if eps != 1e-12:
    hints.warnings.append(
      f"text_config.layer_norm_eps is {eps}; set to the 1e-12 that BLIP was "
      "trained with"
    )
  return hints


def from_shapes(
  leaves: Leaves, family: str, hints: Hints
) -> model_config.BlipConfig:
  """The config of a model with these weights.

  Raises:
    ValueError: weights and hints contradict each other, or nobody says how
      many heads there are.
  """
  shape = lambda path: leaves[f"params/{path}"].shape
  for path in ("visual_encoder/pos_embed", "visual_encoder/patch_embed/kernel"):
    if f"params/{path}" not in leaves:
      raise ValueError(
        f"no {path} among the weights: this is no BLIP model, or a part of one"
      )
  patch_size, _, _, width = shape("visual_encoder/patch_embed/kernel")
  side = math.isqrt(shape("visual_encoder/pos_embed")[1] - 1)
  if side * side + 1 != shape("visual_encoder/pos_embed")[1]:
    raise ValueError(
      f"pos_embed has {shape('visual_encoder/pos_embed')[1]} positions, which "
      "are no square and a [CLS]; only square images have been released"
    )
  vit = _with_hints(
    "image tower",
    dict(
      patch_size=patch_size,
      width=width,
      depth=_depth(leaves, "params/visual_encoder/block_"),
      mlp_dim=shape("visual_encoder/block_0/fc_in/kernel")[1],
    ),
    hints.vit,
  )
  tower = "text_encoder"
  if f"params/{tower}/word_embeddings" not in leaves:
    tower = "text_decoder"
  vocab_size, text_width = shape(f"{tower}/word_embeddings")
  med = _with_hints(
    "text tower",
    dict(
      width=text_width,
      depth=_depth(leaves, f"params/{tower}/layer_"),
      mlp_dim=shape(f"{tower}/layer_0/fc_in/kernel")[1],
      max_positions=shape(f"{tower}/position_embeddings")[0],
    ),
    hints.med,
  )
  vit.setdefault("drop_path", _drop_path(family, width))
  embed_dim = hints.embed_dim or 256
  if "params/vision_proj/kernel" in leaves:
    found = shape("vision_proj/kernel")[1]
    if hints.embed_dim not in (None, found):
      raise _contradiction("embed_dim", hints.embed_dim, found)
    embed_dim = found
  return model_config.BlipConfig(
    model_config.ViTConfig(image_size=(side * patch_size,) * 2, **vit),
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
  """BERT's ids, and BLIP's two behind the vocabulary, where nobody knows."""
  added = {"dec": vocab_size - 2, "enc": vocab_size - 1}
  return model_config.SpecialTokens(**{**added, **known})


def _with_hints(tower: str, found: dict, hints: Mapping[str, Any]) -> dict:
  for name, value in found.items():
    if hints.get(name, value) != value:
      raise _contradiction(f"{name} of the {tower}", hints[name], value)
  sizes = {**hints, **found}
  if "num_heads" not in sizes:
    if found["width"] not in PUBLISHED_WIDTHS:
      raise ValueError(
        f"the {tower} is {found['width']} wide; how many heads that is, no "
        "shape tells: give a config with --model-config (model_config=)"
      )
    sizes["num_heads"] = found["width"] // HEAD_WIDTH
  return sizes


def _contradiction(what: str, said, found) -> ValueError:
  return ValueError(
    f"the config says {what} is {said}, the weights say {found}; give the "
    "config that belongs to these weights with --model-config (model_config=)"
  )


def _depth(leaves: Leaves, prefix: str) -> int:
  found = {
    int(re.match(r"\d+", path.removeprefix(prefix)).group())
    for path in leaves
    if path.startswith(prefix)
  }
  if not found:
    raise ValueError(f"no layers among the weights: nothing under {prefix}0")
  return max(found) + 1


def _drop_path(family: str, width: int) -> float:
  """The original's rate in training: always with ViT-L, and in two tasks."""
  return 0.1 if width == 1024 or family in ("vqa", "nlvr") else 0.0
