"""NLVR2: is a statement about two images true? (paper, section 5.4)

Dimensions: B statements, H and W image height and width, L text length.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from blip_jax.models import families
from blip_jax.models import nlvr as nlvr_lib
from blip_jax.tasks import base, losses


@dataclasses.dataclass(frozen=True)
class Nlvr(base.WithoutMomentum):
  """The NLVR2 task."""

  model: nlvr_lib.Nlvr

  def init(self, rng: PRNGKeyArray) -> base.Params:
    return families.init("nlvr", self.model.config, rng)

  def loss(
    self,
    params: base.Params,
    momentum: None,
    batch: base.Batch,
    *,
    rng: PRNGKeyArray,
    step: Int[Array, ""],
    train: bool = True,
  ) -> tuple[Float[Array, ""], tuple[None, base.Metrics]]:
    """Cross-entropy of the classification as false or true.

    The batch contains image_0 and image_1, uint8 [B, H, W, 3], or float32 if
    already normalised; input_ids and attention_mask, int32 [B, L]; label, int32
    [B], 1 if the statement is true.
    """
    image = jnp.concatenate(
      [base.pixels(batch, "image_0"), base.pixels(batch, "image_1")]
    )
    logits: Any = self.model.apply(
      {"params": params},
      image,
      *base.text(batch),
      not train,
      rngs={"dropout": rng},
    )
    label = batch["label"]
    loss, accuracy = losses.classification_loss(
      logits, label, jnp.ones(len(label), bool)
    )
    return loss, (None, {"loss": loss, "accuracy": accuracy})
