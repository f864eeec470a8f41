"""The interface between the training loop and a task."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped, UInt8

from blip_jax.data import examples, tokenizer
from blip_jax.models import config as model_config
from blip_jax.runtime.config import Config

Params = dict
Batch = Mapping[str, Array]
Metrics = dict[str, Float[Array, ""]]


@runtime_checkable
class Task(Protocol):
  """A model, its loss, and the functions that evaluators may call."""

  @property
  def model(self) -> nn.Module: ...

  @property
  def predict_fns(self) -> Mapping[str, Callable]:
    """Functions of (params, ...), by name; see `align.predict_fns`."""
    ...

  def init(self, rng: PRNGKeyArray) -> Params:
    """Returns newly initialised parameters, as they are stored and trained."""
    ...

  def init_momentum(self, params: Params, rng: PRNGKeyArray) -> Any | None:
    """Returns the initial momentum state, which `loss` updates, or None."""
    ...

  def clamp(self, params: Params) -> Params:
    """Clips parameters to their allowed range; applied before every step."""
    ...

  def loss(
    self,
    params: Params,
    momentum: Any,
    batch: Batch,
    *,
    rng: PRNGKeyArray,
    step: Array,
    train: bool = True,
  ) -> tuple[Float[Array, ""], tuple[Any, Metrics]]:
    """Computes the loss of one batch.

    Args:
      params: after `clamp`.
      momentum: the momentum state, if the task has one.
      batch: the arrays of `TaskFile.example`.
      rng: for dropout and sampling.
      step: number of steps done.
      train: whether dropout is active.

    Returns:
      The loss, the next momentum state, and metrics by name.
    """
    ...


@runtime_checkable
class SummedTask(Task, Protocol):
  """A task whose loss is a mean of terms that belong to single examples.

  So it is a sum over parts of a batch, as are all its metrics, once the number
  of terms of the whole batch is known. See `tasks.gradients`.
  """

  def num_terms(self, batch: Batch) -> Shaped[Array, "*G"]:
    """Counts the terms of a batch; of each group, if the loss has groups."""
    ...

  def loss(
    self,
    params: Params,
    momentum: Any,
    batch: Batch,
    *,
    rng: PRNGKeyArray,
    step: Array,
    train: bool = True,
    num_terms: Shaped[Array, "*G"] | None = None,
  ) -> tuple[Float[Array, ""], tuple[Any, Metrics]]:
    """See `Task.loss`.

    Args:
      num_terms: of the batch of which this one is a part; by default its own.
    """
    ...


class TaskFile(Protocol):
  """What the module of a task defines; see `blip_jax.task_table`."""

  @property
  def FAMILY(self) -> str:
    """The model family it trains, one of `models.families.FAMILIES`."""
    ...

  def defaults(self) -> Config:
    """Returns the default config of the task, with all keys."""
    ...

  def check(self, config: Config) -> None:
    """Checks the keys that only this task has.

    Raises:
      ValueError: names the key, the allowed values, and the value found.
    """
    ...

  def example(
    self,
    config: Config,
    tokenizer: tokenizer.Tokenizer,
    image: examples.ImageTransform,
  ) -> examples.Example:
    """Returns the function from records to the task's examples."""
    ...

  def make(
    self,
    config: Config,
    model: Any,
    *,
    prompt_length: int,
    num_shards: int,
  ) -> Task:
    """Returns the task.

    Args:
      config: of the run.
      model: a module of the family FAMILY.
      prompt_length: number of tokens of the config's prompt, [DEC] included; 1
        if there is no prompt.
      num_shards: number of data shards over which the mesh splits a batch.
    """
    ...


def pair_example(
  config: Config,
  tokenizer: tokenizer.Tokenizer,
  image: examples.ImageTransform,
  prompt: str = "",
  with_image_id: bool = False,
) -> examples.PairExample:
  """Returns the function from records to image-text pairs.

  Args:
    config: of the run; `config.data` has the text lengths.
    tokenizer: of the captions.
    image: brings a decoded image to the model's size.
    prompt: the prefix of every caption.
    with_image_id: whether to add `image_id`, a number that captions of one
      image share.
  """
  return examples.PairExample(
    tokenizer,
    image,
    config.data.max_words,
    config.data.max_length,
    prompt=prompt,
    with_image_id=with_image_id,
  )


class WithoutMomentum:
  """Defaults of `Task` for tasks without momentum encoders and temperature."""

  def init_momentum(self, params: Params, rng: PRNGKeyArray) -> None:
    return None

  def clamp(self, params: Params) -> Params:
    return params

  @property
  def predict_fns(self) -> dict[str, Callable]:
    return {}


def passes(model: nn.Module, rng: PRNGKeyArray, train: bool) -> Callable:
  """Returns `run(params, method, ...)`, which applies a method of the model.

  Each call has its own dropout key, derived from `rng` and the number of calls
  before it; so the order of the calls in a loss is part of its random stream.
  """
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
  """Normalised pixels of a batch.

  Args:
    batch: with images as uint8, or as float32 that is already normalised.
    key: name of the images.
  """
  image = batch[key]
  return normalise(image) if image.dtype == jnp.uint8 else image


def text(batch: Batch) -> tuple[Int[Array, "B L"], Int[Array, "B L"]]:
  """Token ids and attention mask of a batch."""
  return batch["input_ids"], batch["attention_mask"]


def normalise(image: UInt8[Array, "*B H W 3"]) -> Float[Array, "*B H W 3"]:
  """Normalises pixels as the image tower expects.

  Runs on the device, so that images are transferred as bytes and not as
  floats.
  """
  channels = (1,) * (image.ndim - 1) + (3,)
  mean = jnp.array(model_config.IMAGE_MEAN).reshape(channels)
  std = jnp.array(model_config.IMAGE_STD).reshape(channels)
  return (image.astype(jnp.float32) / 255 - mean) / std
