"""Visual dialog: choosing the answer to a question (paper, section 5.5).

A text encoder reads the caption that the dialog is about. The dialog encoder
reads the history, the question and a candidate answer, attends to the tokens of
the image and to the states of the caption, and its ITM head says whether the
candidate is right.

Dimensions: B dialogs, H and W image height and width, N image tokens, Lc length
of the context (the caption), K = N + Lc states to attend to, R rounds, C
candidates of a round, L length of a text, D width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import spmd
from jaxtyping import Array, Float, Int, PRNGKeyArray

from blip_jax import defaults as default_keys
from blip_jax.data import dialog_examples, examples, tokenizer
from blip_jax.models import blip, families
from blip_jax.models import config as model_config
from blip_jax.runtime import config as run_config
from blip_jax.runtime.config import Config
from blip_jax.tasks import base, losses

FAMILY = "dialog"


def defaults() -> Config:
  """Defaults of visual dialog (section 5.5), from a pre-trained model."""
  config = default_keys.fine_tuning("dialog")
  config.batch_size = 240
  config.num_epochs = 20.0
  config.optim.lr = 2e-5
  config.dialog = dict(
    rounds=1,  # sampled from a dialog, each time it is trained on
    negatives=3,  # wrong candidates sampled in each of these rounds
    context_length=40,  # tokens of the caption, [CLS] and [SEP] included
    # Larger dialogs are skipped in evaluation: the largest one decides the
    # size of all batches.
    max_rounds=50,  # with candidates
    max_candidates=1000,  # of a round
  )
  config.data.max_words = 30
  config.data.max_length = 192
  config.evals.batch_size = 8
  config.evals.best = ("val/mrr",)
  config.evals.val = default_keys.split("")
  config.evals.test = default_keys.split("")
  return config


def check(config: Config) -> None:
  """Checks the keys of `config.dialog`; see `base.TaskFile`."""
  for key in ("rounds", "negatives", "max_rounds", "max_candidates"):
    run_config.at_least(1, config, f"dialog.{key}")
  run_config.at_least(3, config, "dialog.context_length")


def example(
  config: Config,
  tokenizer: tokenizer.Tokenizer,
  image: examples.ImageTransform,
) -> dialog_examples.DialogExample:
  """Dialogs with sampled rounds, and sampled candidates in each."""
  texts = dialog_examples.DialogTexts(
    tokenizer,
    config.data.max_words,
    config.dialog.context_length,
    config.data.max_length,
  )
  c = config.dialog
  return dialog_examples.DialogExample(
    texts, image, c.rounds, 1 + c.negatives, sampled=True
  )


def make(
  config: Config, model: blip.Blip, *, prompt_length: int, num_shards: int
) -> "Dialog":
  """The task of a config; see `base.TaskFile`.

  Raises:
    ValueError: the towers have different widths.
  """
  check_widths(model.config)
  return Dialog(model)


def check_widths(sizes: model_config.BlipConfig) -> None:
  """Raises `ValueError` unless both towers have the same width."""
  vit, text = sizes.vit.width, sizes.med.width
  if vit != text:
    raise ValueError(
      "visual dialog attends to image tokens and the states of a caption as to "
      f"one sequence, which needs towers of one width, found {vit} for images "
      f"and {text} for texts. ViT-B is as wide as BERT, and ViT-L is not; set "
      "--config.model.variant=base"
    )


def see(
  run: Callable[..., Any], batch: base.Batch
) -> tuple[Float[Array, "B K D"], Int[Array, "B K"]]:
  """What the texts of each dialog attend to: its image, and its context.

  Args:
    run: `(method, ...)` applies a method of the model.
    batch: of `Dialog.loss`.

  Returns:
    Image tokens and states of the context, and a mask that is 0 on padding.
  """
  context_mask = batch["context_mask"]
  image = run("encode_image", base.pixels(batch))
  context = run("encode_text", batch["context_ids"], context_mask)
  everywhere = jnp.ones(image.shape[:2], context_mask.dtype)
  return (
    jnp.concatenate([image, context], axis=1),
    jnp.concatenate([everywhere, context_mask], axis=1),
  )


def score(
  model: blip.Blip, params: base.Params, batch: base.Batch
) -> Float[Array, "B R C"]:
  """Scores all candidates of all rounds; for the batch see `Dialog.loss`.

  Image and context are encoded once for all texts of a dialog, and so are their
  keys and values. Texts of one round are scored at a time, and rounds that no
  dialog of the batch has are skipped.

  Returns:
    Logit of "right" minus that of "wrong", 0 where there is no text.
  """

  def run(method: str, *args, **kwargs) -> Any:
    return model.apply({"params": params}, *args, method=method, **kwargs)

  states, seen = see(run, batch)
  kv = run("image_kv", states)

  def score_round(texts):
    ids, mask = (x.reshape(-1, x.shape[-1]) for x in texts)
    wrong, right = run("match", ids, mask, kv, image_mask=seen).T
    scores = jnp.where(mask[:, 0] == 1, right - wrong, 0.0)
    return scores.reshape(texts[0].shape[:2])

  def nothing(texts):
    return jnp.zeros(texts[0].shape[:2])

  rounds = [jnp.swapaxes(x, 0, 1) for x in _texts(batch)]
  scores = jax.lax.map(
    lambda texts: jax.lax.cond(texts[1].any(), score_round, nothing, texts),
    rounds,
  )
  return spmd.with_logical_constraint(
    jnp.swapaxes(scores, 0, 1), ("batch", None, None)
  )


@dataclasses.dataclass(frozen=True)
class Dialog(base.WithoutMomentum):
  """The task of visual dialog.

  Attributes:
    model: a module with an image tower and a text encoder of one width.
  """

  model: blip.Blip

  def init(self, rng: PRNGKeyArray) -> base.Params:
    return families.init("dialog", self.model.config, rng)

  def loss(
    self,
    params: base.Params,
    momentum: None,
    batch: base.Batch,
    *,
    rng: PRNGKeyArray,
    step: Int[Array, ""],
    train: bool = True,
    num_terms: Int[Array, ""] | None = None,
  ) -> tuple[Float[Array, ""], tuple[None, base.Metrics]]:
    """Mean cross-entropy of candidates as wrong or right.

    The batch contains image, uint8 [B, H, W, 3], or float32 if already
    normalised; context_ids and context_mask, int32 [B, Lc]; input_ids and
    attention_mask, int32 [B, R, C, L], the mask 0 where there is no text;
    label, int32 [B, R, C], 1 for right candidates.
    """
    run = functools.partial(base.passes(self.model, rng, train), params)
    states, seen = see(run, batch)
    kv: Any = self.model.apply({"params": params}, states, method="image_kv")
    ids, mask = (x.reshape(-1, x.shape[-1]) for x in _texts(batch))
    logits = run("match", ids, mask, kv, image_mask=seen)
    loss, accuracy = losses.classification_loss(
      logits, batch["label"].reshape(-1), mask[:, 0] == 1, num_terms
    )
    return loss, (None, {"loss": loss, "accuracy": accuracy})

  def num_terms(self, batch: base.Batch) -> Int[Array, ""]:
    """The number of candidates that have a text; see `base.SummedTask`."""
    return jnp.sum(batch["attention_mask"][..., 0] == 1)

  @property
  def predict_fns(self) -> dict[str, Callable]:
    return {"score": functools.partial(score, self.model)}


def _texts(
  batch: base.Batch,
) -> tuple[Int[Array, "B R C L"], Int[Array, "B R C L"]]:
  return batch["input_ids"], batch["attention_mask"]
