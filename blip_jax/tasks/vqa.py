"""VQA as answer generation (paper, section 5.3).

An encoder fuses question and image; a decoder that attends to its output
generates the answer.

Dimensions: B images with a question each, H and W image height and width, A
answers of all questions, Lq and La lengths of questions and answers.
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
    model: a module with an image tower and both text towers, not tied.
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
    """The weighted sum of the answers' losses, divided by B.

    The batch contains image, uint8 [B, H, W, 3], or float32 if already
    normalised; question_ids and question_mask, int32 [B, Lq]; answer_ids and
    answer_mask, int32 [A, La]; answer_weight, float32 [A], 0 for padding;
    answer_question, int32 [A], the index of the question that it answers.
    """
    run = base.passes(self.model, rng, train)
    question_mask = batch["question_mask"]
    key_value = lambda states, method: self.model.apply(
      {"params": params}, states, method=method
    )
    image_embeds = run(params, "encode_image", base.pixels(batch))
    image_kv = key_value(image_embeds, "image_kv")
    question = run(
      params, "fuse", batch["question_ids"], question_mask, image_kv
    )
    # Keys and values of a question are computed once for all of its answers.
    index = batch["answer_question"]
    question_kv = jax.tree.map(
      lambda x: x[:, index], key_value(question, "decoder_kv")
    )
    ids, mask = batch["answer_ids"], batch["answer_mask"]
    predicted = run(
      params,
      "decode",
      ids,
      mask,
      question_kv,
      encoder_mask=question_mask[index],
    )
    weights = batch["answer_weight"][:, None] * mask[:, 1:]
    loss, nll = losses.weighted_lm_loss(
      predicted,
      jnp.where(mask == 1, ids, losses.IGNORE),
      weights / len(question_mask),
      self.label_smoothing,
    )
    return loss, (None, {"loss": loss, "loss_lm": loss, "nll_lm": nll})
