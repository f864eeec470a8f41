"""Captioning: LM of a caption behind a prompt (paper, section 5.2).

Dimensions: B images and their captions, L text length.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from blip_jax.models import blip, families
from blip_jax.tasks import base, losses


@dataclasses.dataclass(frozen=True)
class Caption(base.WithoutMomentum):
  """The captioning task.

  Attributes:
    model: with an image tower and a text decoder.
    prompt_length: tokens that every text starts with and that are not learned,
      the first one ([DEC]) included; 4 for "a picture of".
    label_smoothing: of LM.
    groups: whose means are averaged; see `losses.lm_loss`.
  """

  model: blip.Blip
  prompt_length: int
  label_smoothing: float = 0.1
  groups: int = 1

  def init(self, rng: PRNGKeyArray) -> base.Params:
    return families.init("caption", self.model.config, rng)

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
    """Batch: as in pre-training; texts are prompt and caption."""
    ids, mask = base.text(batch)
    run = base.passes(self.model, rng, train)
    image_embeds = run(params, "encode_image", base.pixels(batch))
    image_kv = self.model.apply(
      {"params": params}, image_embeds, method="project_for_decoder"
    )
    logits = run(params, "decode", ids, mask, image_kv)
    learned = (mask == 1) & (jnp.arange(ids.shape[1]) >= self.prompt_length)[
      None
    ]
    lm_loss = functools.partial(
      losses.lm_loss,
      logits,
      jnp.where(learned, ids, losses.IGNORE),
      groups=self.groups,
    )
    loss = lm_loss(self.label_smoothing)
    return loss, (None, {"loss": loss, "loss_lm": loss, "nll_lm": lm_loss(0.0)})
