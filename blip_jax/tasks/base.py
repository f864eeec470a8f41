"""What the training loop knows of a task."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from blip_jax.config import Config
from blip_jax.data import examples, tokenizer
from blip_jax.models import blip
from blip_jax.models import config as model_config

Params = dict
Batch = Mapping[str, Array]
Metrics = dict[str, Float[Array, ""]]


@runtime_checkable
class Task(Protocol):
  """Owns the model, the loss of one batch and what evaluators may call."""

  model: nn.Module
  predict_fns: Mapping[str, Callable]

  def init(self, rng: PRNGKeyArray) -> Params:
    """Fresh parameters, as they are stored and optimised."""

  def init_momentum(self, params: Params, rng: PRNGKeyArray) -> Any | None:
    """State beside the parameters that `loss` updates itself, if any."""

  def clamp(self, params: Params) -> Params:
    """Puts parameters back into their allowed range, before every step."""

  def loss(
    self,
    params: Params,
    momentum: Any | None,
    batch: Batch,
    *,
    rng: PRNGKeyArray,
    step: Array,
    train: bool = True,
  ) -> tuple[Float[Array, ""], tuple[Any | None, Metrics]]:
    """The loss of one batch, the next momentum state, and metrics."""


class TaskFile(Protocol):
  """What a file of this folder has to define; see `blip_jax.task_table`."""

  # Which of the paper's models it trains, of `models.families.FAMILIES`.
  FAMILY: str

  def defaults(self) -> Config:
    """The task's config, with all keys."""
    ...

  def check(self, config: Config) -> None:
    """Refuses values of the task's own keys.

    Raises:
      ValueError: names the key, what it may be, and what was found.
    """
    ...

  def example(
    self,
    config: Config,
    tokenizer: tokenizer.Tokenizer,
    image: examples.ImageTransform,
  ) -> examples.Example:
    """What turns records into the task's examples."""
    ...

  def make(
    self,
    config: Config,
    model: blip.Blip,
    *,
    prompt_length: int,
    num_shards: int,
  ) -> Task:
    """The task.

    Args:
      prompt_length: tokens of the config's prompt, [DEC] included; 1 for none.
      num_shards: pieces that the batch is split into over the mesh.
    """
    ...


def pair_example(
  config: Config,
  tokenizer: tokenizer.Tokenizer,
  image: examples.ImageTransform,
  prompt: str = "",
  with_image_id: bool = False,
) -> examples.PairExample:
  """Image-text pairs, as `config.data` wants them."""
  return examples.PairExample(
    tokenizer,
    image,
    config.data.max_words,
    config.data.max_length,
    prompt=prompt,
    with_image_id=with_image_id,
  )


class WithoutMomentum:
  """What a task without a twin and a temperature has of `Task`."""

  def init_momentum(self, params: Params, rng: PRNGKeyArray) -> None:
    return None

  def clamp(self, params: Params) -> Params:
    return params

  @property
  def predict_fns(self) -> dict[str, Callable]:
    return {}


def passes(model: nn.Module, rng: PRNGKeyArray, train: bool) -> Callable:
  """`(params, method, ...)`: applies it, each time with dropout of its own."""
  count = itertools.count()

  def run(params: Params, method: str, *args, **kwargs):
    return model.apply(
      {"params": params},
      *args,
      deterministic=not train,
      method=method,
      rngs={"dropout": jax.random.fold_in(rng, next(count))},
      **kwargs,
    )

  return run


def pixels(batch: Batch, key: str = "image") -> Float[Array, "*B H W 3"]:
  """Normalised pixels of a batch, whose images are uint8 or normalised."""
  image = batch[key]
  return normalise(image) if image.dtype == jnp.uint8 else image


def text(batch: Batch) -> tuple[Int[Array, "B L"], Int[Array, "B L"]]:
  return batch["input_ids"], batch["attention_mask"]


def normalise(image: UInt8[Array, "*B H W 3"]) -> Float[Array, "*B H W 3"]:
  """Pixels as the image tower expects them; on the device, so that a quarter
  of the bytes cross the bus."""
  channels = (1,) * (image.ndim - 1) + (3,)
  mean = jnp.array(model_config.IMAGE_MEAN).reshape(channels)
  std = jnp.array(model_config.IMAGE_STD).reshape(channels)
  return (image.astype(jnp.float32) / 255 - mean) / std
