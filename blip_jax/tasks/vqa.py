"""VQA: the answer is written by a decoder that looks at the question, which an
encoder has read while looking at the image (paper, section 5.3).

Dimensions: B images with a question each, A answers of all of them, Lq and La
their lengths.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from blip_jax.models import blip, families
from blip_jax.tasks import base, losses


@dataclasses.dataclass(frozen=True)
class Vqa(base.WithoutMomentum):
  """The VQA task.

  Attributes:
    model: with an image tower and both text towers, which share nothing.
    label_smoothing: of LM.
  """

  model: blip.Blip
  label_smoothing: float = 0.1

  def init(self, rng: PRNGKeyArray) -> base.Params:
    return families.init("vqa", self.model.config, rng)

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
    """Sums every answer's loss by its weight, and divides by B.

    Batch: image [B, H, W, 3]; question_ids, question_mask [B, Lq]; answer_ids,
    answer_mask [A, La]; answer_weight [A], 0 on padding; answer_question [A],
    the row of the question that it answers.
    """
    run = base.passes(self.model, rng, train)
    question_mask = batch["question_mask"]
    project = lambda states, method: self.model.apply(
      {"params": params}, states, method=method
    )
    image_embeds = run(params, "encode_image", base.pixels(batch))
    image_kv = project(image_embeds, "image_kv")
    question = run(
      params, "fuse", batch["question_ids"], question_mask, image_kv
    )
    # A question's keys are projected once, for all of its answers.
    of_answer = batch["answer_question"]
    question_kv = jax.tree.map(
      lambda x: x[of_answer], project(question, "decoder_kv")
    )
    ids, mask = batch["answer_ids"], batch["answer_mask"]
    logits = run(
      params,
      "decode",
      ids,
      mask,
      question_kv,
      encoder_mask=question_mask[of_answer],
    )
    labels = jnp.where(mask == 1, ids, losses.IGNORE)
    mean = lambda smoothing: (
      jnp.sum(
        batch["answer_weight"]
        * losses.lm_loss_per_text(logits, labels, smoothing)
      )
      / len(question_mask)
    )
    loss = mean(self.label_smoothing)
    return loss, (None, {"loss": loss, "loss_lm": loss, "nll_lm": mean(0.0)})
