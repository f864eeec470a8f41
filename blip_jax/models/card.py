"""What a checkpoint says of its model, so that it can be used alone.

A checkpoint's item `model` has it as `model.json`, beside the vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from blip_jax.models import config as model_config
from blip_jax.models import families


@dataclasses.dataclass(frozen=True)
class Card:
  """A model, without its weights.

  Attributes:
    family: one of `families.FAMILIES`.
    config: shapes of its towers.
    prompt: what its captions start with; "" starts from [DEC] alone.
    generation: how it decodes by default.
    source: where its weights came from; "" for our own runs.
  """

  family: str
  config: model_config.BlipConfig
  prompt: str = ""
  generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  source: str = ""

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> "Card":
    """Undoes `to_json`.

    Raises:
      ValueError: names the key that is missing, unknown or of no use.
    """
    try:
      config = config_from_json(value["config"])
      card = cls(**{**value, "config": config})
    except (KeyError, TypeError) as error:
      raise ValueError(f"not the description of a model: {error}") from error
    if card.family not in families.FAMILIES:
      raise ValueError(
        f"family: expected one of {families.FAMILIES}, found {card.family!r}"
      )
    return card


def config_from_json(value: Mapping[str, Any]) -> model_config.BlipConfig:
  vit, med = dict(value["vit"]), dict(value["med"])
  vit["image_size"] = tuple(vit["image_size"])
  med["tokens"] = model_config.SpecialTokens(**med["tokens"])
  return model_config.BlipConfig(
    model_config.ViTConfig(**vit),
    model_config.MedConfig(**med),
    value["embed_dim"],
  )
