"""The description of a model that a checkpoint contains.

It is the file `model.json` in the item `model` of a checkpoint, next to the
vocabulary, so that a checkpoint can be used without its config.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from blip_jax.models import config as model_config
from blip_jax.models import families

# How the original decodes: configs/caption_coco.yaml and models/blip_vqa.py.
# The lengths are in tokens and count the prompt, [DEC] and [SEP].
GENERATION = {
  "caption": dict(
    num_beams=3, max_length=20, min_length=5, repetition_penalty=1.0
  ),
  "vqa": dict(num_beams=3, max_length=10, min_length=1),
}

# The original's captioners never saw a caption without it.
PROMPT = "a picture of "


def prompt_of(family: str, layout: str) -> str:
  """The prompt of a model in a layout that has no place for one.

  The models of transformers caption without a prompt.
  """
  return PROMPT if family == "caption" and layout == "original" else ""


@dataclasses.dataclass(frozen=True)
class Card:
  """Everything about a model but its weights.

  Attributes:
    family: one of `families.FAMILIES`.
    config: sizes of its towers.
    prompt: the prefix of its captions; "" if there is only [DEC].
    generation: default decoding options, fields of `decoding.Decoding`.
    source: where converted weights came from; "" for runs of this package.
  """

  family: str
  config: model_config.BlipConfig
  prompt: str = ""
  generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  source: str = ""

  def to_json(self) -> dict[str, Any]:
    """The card as nested dictionaries, for `json.dumps`."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> "Card":
    """The inverse of `to_json`.

    Raises:
      ValueError: a key is missing, unknown, or has an impossible value.
    """
    try:
      config = config_from_json(value["config"])
      card = cls(**{**value, "config": config})
    except (KeyError, TypeError) as error:
      raise ValueError(f"not a model description: {error}") from error
    if card.family not in families.FAMILIES:
      raise ValueError(
        f"family: expected one of {families.FAMILIES}, found {card.family!r}"
      )
    return card


def config_from_json(value: Mapping[str, Any]) -> model_config.BlipConfig:
  """The inverse of `dataclasses.asdict` for a model config."""
  vit, med = dict(value["vit"]), dict(value["med"])
  vit["image_size"] = tuple(vit["image_size"])
  med["tokens"] = model_config.SpecialTokens(**med["tokens"])
  return model_config.BlipConfig(
    model_config.ViTConfig(**vit),
    model_config.MedConfig(**med),
    value["embed_dim"],
  )
