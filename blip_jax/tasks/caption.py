"""Captioning: LM of a caption after a prompt (paper, section 5.2).

Dimensions: B images, or videos, with a caption each, G groups of them (see
`losses.grouped`), F frames, H and W image height and width, L text length, P
prompt length.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, UInt8
from ml_collections import config_dict

from blip_jax import defaults as default_keys
from blip_jax.data import examples, tokenizer
from blip_jax.models import blip, decoding, families, generation
from blip_jax.runtime import config as run_config
from blip_jax.runtime.config import Config
from blip_jax.tasks import base, losses

FAMILY = "caption"


def defaults() -> Config:
  """Defaults of captioning (section 5.2): COCO, from a pre-trained model."""
  config = default_keys.fine_tuning("caption")
  config.num_epochs = 5.0
  config.caption = dict(
    # Prefix of every caption; not in the loss. Unset: that of the run to start
    # from, else "a picture of ".
    prompt=config_dict.placeholder(str),
    label_smoothing=0.1,
  )
  # For evaluation; fields of `models.decoding.Decoding`.
  config.generation = default_keys.generation()
  config.data.max_length = 40
  config.evals.batch_size = 32
  config.evals.best = ("val/CIDEr", "val/Bleu_4")
  config.evals.val = default_keys.captioned_split("")
  config.evals.test = default_keys.captioned_split("")
  return config


def check(config: Config) -> None:
  """Does nothing: no value of `config.caption` needs a check."""


def example(
  config: Config,
  tokenizer: tokenizer.Tokenizer,
  image: examples.ImageTransform,
) -> examples.PairExample:
  """Image-text pairs, whose texts are prompt and caption."""
  return base.pair_example(
    config, tokenizer, image, prompt=run_config.prompt(config)
  )


def make(
  config: Config, model: blip.Blip, *, prompt_length: int, num_shards: int
) -> "Caption":
  """The task of a config; see `base.TaskFile`."""
  return Caption(
    model,
    prompt_length=prompt_length,
    label_smoothing=config.caption.label_smoothing,
    groups=num_shards if config.scope == "local" else 1,
  )


def generate(
  model: blip.Blip,
  params: base.Params,
  image: UInt8[Array, "B *F H W 3"],
  prompt: Int[Array, " P"],
  settings: decoding.Decoding,
  num_positions: int,
  keys: Key[Array, " B"] | None = None,
) -> generation.Generated:
  """Generates captions of images or videos; see `generation.generate`."""
  states: Any = model.apply(
    {"params": params}, base.normalise(image), method="encode_image"
  )
  return generation.generate(
    model, params, states, prompt, settings, num_positions, keys
  )


@dataclasses.dataclass(frozen=True)
class Caption(base.WithoutMomentum):
  """The captioning task.

  Attributes:
    model: a module with an image tower and a text decoder.
    prompt_length: number of prompt tokens, which are not in the loss, [DEC]
      included; 4 for "a picture of".
    label_smoothing: of LM.
    groups: number of groups over whose means the loss averages; see
      `losses.lm_loss`.
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
    num_terms: Int[Array, " G"] | None = None,
  ) -> tuple[Float[Array, ""], tuple[None, base.Metrics]]:
    """LM of the tokens after the prompt.

    The batch is that of pre-training; texts are prompt and caption.
    """
    ids, mask = base.text(batch)
    run = base.passes(self.model, rng, train)
    image_embeds = run(params, "encode_image", base.pixels(batch))
    image_kv = self.model.apply(
      {"params": params}, image_embeds, method="decoder_kv"
    )
    loss, nll = losses.lm_loss(
      run(params, "decode", ids, mask, image_kv),
      self._labels(batch),
      self.label_smoothing,
      self.groups,
      num_terms,
    )
    return loss, (None, {"loss": loss, "loss_lm": loss, "nll_lm": nll})

  def num_terms(self, batch: base.Batch) -> Int[Array, " G"]:
    """The tokens that are predicted; see `base.SummedTask`."""
    return losses.count_tokens(self._labels(batch), self.groups)

  def _labels(self, batch: base.Batch) -> Int[Array, "B L"]:
    ids, mask = base.text(batch)
    after_prompt = (jnp.arange(ids.shape[1]) >= self.prompt_length)[None]
    return jnp.where((mask == 1) & after_prompt, ids, losses.IGNORE)

  @property
  def predict_fns(self) -> dict[str, Callable]:
    return {"caption": functools.partial(generate, self.model)}
