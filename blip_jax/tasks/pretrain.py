"""Pre-training: ITC, ITM and LM on image-text pairs (paper, section 3.2).

Dimensions: B batch, H and W image height and width, L text length.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from blip_jax import defaults as default_keys
from blip_jax.data import examples, tokenizer
from blip_jax.models import blip, families, tying
from blip_jax.runtime import config as run_config
from blip_jax.runtime.config import Config
from blip_jax.tasks import align, base, caption, losses
from blip_jax.tasks import momentum as momentum_lib

FAMILY = "pretrain"


def defaults() -> Config:
  """Defaults of pre-training (section 4.1 of the paper, and its code)."""
  config = default_keys.training("pretrain")
  config.pretrain = dict(
    **align.defaults(),
    alpha_ramp_epochs=2.0,  # of optim.steps_per_epoch
    # ITM negatives are sampled among so many neighbours in the batch; 0: among
    # all of config.scope.  Image tokens of a group are sent to its devices.
    negative_group=0,
    label_smoothing=0.1,
    loss_weights=(1.0, 1.0, 1.0),  # ITC, ITM, LM
  )
  config.evals.val = default_keys.ranked_split("")
  return config


def check(config: Config) -> None:
  """Checks the keys of `config.pretrain`; see `base.TaskFile`."""
  align.check(config)
  run_config.at_least(0, config, "pretrain.negative_group")


def example(
  config: Config,
  tokenizer: tokenizer.Tokenizer,
  image: examples.ImageTransform,
) -> examples.PairExample:
  """Image-text pairs."""
  return base.pair_example(config, tokenizer, image)


def make(
  config: Config, model: blip.Blip, *, prompt_length: int, num_shards: int
) -> "Pretrain":
  """The task of a config; see `base.TaskFile`."""
  return Pretrain(
    model,
    negative_group=config.pretrain.negative_group,
    label_smoothing=config.pretrain.label_smoothing,
    loss_weights=tuple(config.pretrain.loss_weights),
    **align.arguments(config, num_shards),
  )


@dataclasses.dataclass(frozen=True)
class Pretrain(align.Align):
  """The pre-training task.

  Parameters that the text towers share are stored once.  ITM negatives, too,
  are sampled only within a group, or within smaller ones.

  Attributes:
    negative_group: number of examples among which ITM negatives are sampled; 0
      is all of a group of ITC.
    label_smoothing: of LM.
    loss_weights: weights of (ITC, ITM, LM).
  """

  negative_group: int = 0
  label_smoothing: float = 0.1
  loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)

  def init(self, rng: PRNGKeyArray) -> base.Params:
    return families.init("pretrain", self.model.config, rng)

  def loss(
    self,
    params: base.Params,
    momentum: momentum_lib.Momentum,
    batch: base.Batch,
    *,
    rng: PRNGKeyArray,
    step: Int[Array, ""],
    train: bool = True,
  ) -> tuple[Float[Array, ""], tuple[momentum_lib.Momentum, base.Metrics]]:
    """The loss; numbers refer to the order of a step in `tasks/momentum.py`.

    The batch contains image, uint8 [B, H, W, 3], or float32 if already
    normalised; input_ids and attention_mask, int32 [B, L].  `params` must have
    been clamped (1).

    Raises:
      ValueError: a group has fewer than two examples, or does not consist of
        whole groups of negatives.
    """
    # Batches of an evaluation have another size, and need no smaller groups.
    negative_group = self.negative_group if train else 0
    self._check(batch, negative_group)
    image, ids, mask = base.pixels(batch), *base.text(batch)
    key_negatives, key_dropout = jax.random.split(rng)
    run = base.passes(self.model, key_dropout, train)

    # 2-4. Online features, EMA, momentum features.
    full = self.full_params(params)
    features = self.features(run, full, momentum, image, ids, mask)

    # 5-7. ITC, then momentum features are added to the queue.
    alpha = momentum_lib.ramp(self.alpha, step, self.alpha_ramp_steps)
    own = self.own_pairs(len(ids))
    loss_itc, sims = self.itc(features, params["temp"], alpha, own)
    momentum = momentum_lib.enqueue(
      features.momentum, features.image_feat_m, features.text_feat_m
    )

    # 8-9. ITM and LM share the keys and values of the images.
    image_kv = self.image_kv(full, features.image_embeds)
    loss_itm, itm_acc = self.itm(
      run,
      full,
      features.image_embeds,
      image_kv,
      ids,
      mask,
      self._sample_negatives(key_negatives, sims, negative_group),
    )
    lm = losses.lm_loss(
      run(full, "decode", ids, mask, image_kv),
      jnp.where(mask == 1, ids, losses.IGNORE),
      self.label_smoothing,
      self.groups,
    )

    w_itc, w_itm, w_lm = self.loss_weights
    loss = w_itc * loss_itc + w_itm * loss_itm + w_lm * lm.smoothed
    metrics = {
      "loss": loss,
      "loss_itc": loss_itc,
      "loss_itm": loss_itm,
      "loss_lm": lm.smoothed,
      # Without label smoothing; its exponential is the perplexity.
      "nll_lm": lm.nll,
      "itm_acc": itm_acc,
      "alpha": alpha,
      "temp": params["temp"],
    }
    return loss, (momentum, metrics)

  @property
  def predict_fns(self) -> dict[str, Callable]:
    return {**super().predict_fns, "caption": self._caption}

  def full_params(self, params: base.Params) -> base.Params:
    return tying.tie(params)

  def _caption(self, params, *args):
    return caption.generate(self.model, self.full_params(params), *args)

  def _check(self, batch: base.Batch, negative_group: int) -> None:
    size = len(batch["input_ids"])
    if size % self.groups or size // self.groups < 2:
      raise ValueError(
        f"config.batch_size: {size} examples in {self.groups} group(s) leave "
        "an example without a negative; every group needs at least 2 examples "
        "(increase batch_size, or set config.scope='global' for one group)"
      )
    within = size // self.groups
    if negative_group == 1 or within % (negative_group or within):
      raise ValueError(
        "config.pretrain.negative_group: expected 0 or a divisor of the "
        f"{within} examples that config.scope compares, above 1; found "
        f"{negative_group}"
      )

  def _sample_negatives(self, key, sims, negative_group):
    """Hard negatives within a group, weighted by the similarities of ITC."""
    sims = [losses.grouped(sim, self.groups) for sim in sims]
    if negative_group:
      sims = [losses.within_groups(sim, negative_group) for sim in sims]
    sim_i2t, sim_t2i = sims
    same = jnp.eye(sim_i2t.shape[-1], dtype=bool)[None]
    # The small constant makes every other example possible.
    weights = functools.partial(
      losses.hard_negative_weights, same=same, constant=1e-4
    )
    return self.negatives(key, weights(sim_t2i), weights(sim_i2t))
