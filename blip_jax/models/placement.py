"""How the image tower is computed, by what computes it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from blip_jax.models import config as model_config
from blip_jax.models import fused_attention

# The widest activations that a block should make at once on a CPU: of its MLP,
# 7.1 MB an image of 577 tokens of a base model. Of four such images each takes
# a quarter longer; see tools/bench/README.md.
_CACHED_BYTES = 8 << 20


def place(
  vit: model_config.ViTConfig, devices: Sequence[Any], attention: str = ""
) -> model_config.ViTConfig:
  """The image tower as it is fastest on some devices.

  Args:
    vit: its sizes and its dtype.
    devices: all that share a batch.
    attention: see `fused_attention.choose`.
  """
  kind = fused_attention.choose(
    attention, devices[0], vit.dtype, vit.num_tokens
  )
  number = 0
  # Several devices split the batch, so that images cannot take turns.
  if len(devices) == 1 and devices[0].platform == "cpu":
    number = max(1, _CACHED_BYTES // (4 * vit.num_tokens * vit.mlp_dim))
  return dataclasses.replace(vit, attention=kind, images_at_once=number)


def unplaced(vit: model_config.ViTConfig) -> model_config.ViTConfig:
  """The image tower as any device can compute it."""
  return dataclasses.replace(vit, attention="xla", images_at_once=0)
