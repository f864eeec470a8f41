"""NLVR2: is a statement about two images true? (paper, section 5.4)

Dimensions: B statements, H and W image height and width, L text length.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from blip_jax import defaults as default_keys
from blip_jax.data import examples, statement_examples, tokenizer
from blip_jax.models import families
from blip_jax.models import nlvr as nlvr_lib
from blip_jax.runtime.config import Config
from blip_jax.tasks import base, losses

FAMILY = "nlvr"


def defaults() -> Config:
  """Defaults of NLVR2 (section 5.4), from a pre-trained model."""
  config = default_keys.fine_tuning("nlvr")
  config.num_epochs = 15.0
  config.optim.lr = 3e-5
  config.model.drop_path = 0.1
  config.nlvr = dict(
    # Whether to exchange the images of half of the examples in training, and
    # with them the words "left" and "right".
    swap=True,
    legacy_eval_swap=False,  # the same in evaluation, as in the original
  )
  config.data.max_words = 40
  config.data.max_length = 64
  config.evals.batch_size = 64
  config.evals.best = ("val/accuracy",)
  config.evals.val = default_keys.split("")
  config.evals.test = default_keys.split("")
  return config


def check(config: Config) -> None:
  """NLVR2 has no keys whose values could be wrong; see `base.TaskFile`."""


def example(
  config: Config,
  tokenizer: tokenizer.Tokenizer,
  image: examples.ImageTransform,
) -> statement_examples.StatementExample:
  """Pairs of images with a statement and whether it is true."""
  c = config.data
  return statement_examples.StatementExample(
    tokenizer, image, c.max_words, c.max_length, swap=config.nlvr.swap
  )


def make(
  config: Config,
  model: nlvr_lib.Nlvr,
  *,
  prompt_length: int,
  num_shards: int,
) -> "Nlvr":
  """The task of a config; see `base.TaskFile`."""
  return Nlvr(model)


def compare(
  model: nlvr_lib.Nlvr, params: base.Params, batch: base.Batch
) -> Float[Array, "B 2"]:
  """Logits of (false, true); for the batch see `Nlvr.loss`."""
  logits: Any = model.apply(
    {"params": params}, _images(batch), *base.text(batch)
  )
  return logits


def _images(batch: base.Batch) -> Float[Array, "J H W 3"]:
  """All left images, then all right ones."""
  return jnp.concatenate(
    [base.pixels(batch, "image_0"), base.pixels(batch, "image_1")]
  )


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
    num_terms: Int[Array, ""] | None = None,
  ) -> tuple[Float[Array, ""], tuple[None, base.Metrics]]:
    """Cross-entropy of the classification as false or true.

    The batch contains image_0 and image_1, uint8 [B, H, W, 3], or float32 if
    already normalised; input_ids and attention_mask, int32 [B, L]; label, int32
    [B], 1 if the statement is true.
    """
    logits: Any = self.model.apply(
      {"params": params},
      _images(batch),
      *base.text(batch),
      not train,
      rngs={"dropout": rng},
    )
    label = batch["label"]
    loss, accuracy = losses.classification_loss(
      logits, label, jnp.ones(len(label), bool), num_terms
    )
    return loss, (None, {"loss": loss, "accuracy": accuracy})

  def num_terms(self, batch: base.Batch) -> Int[Array, ""]:
    """The number of statements; see `base.SummedTask`."""
    return jnp.int32(len(batch["label"]))

  @property
  def predict_fns(self) -> dict[str, Callable]:
    return {"compare": functools.partial(compare, self.model)}
