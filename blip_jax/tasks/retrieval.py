"""Retrieval fine-tuning: ITC and ITM (paper, section 5.1).

Several captions may belong to the same image.

Dimensions: B batch, G groups of b examples (see `losses.grouped`), L text
length, Q queue, K = b + Q candidates.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from blip_jax import defaults as default_keys
from blip_jax.data import examples, tokenizer
from blip_jax.models import blip, families
from blip_jax.runtime import config as run_config
from blip_jax.runtime.config import Config
from blip_jax.tasks import align, base, losses
from blip_jax.tasks import momentum as momentum_lib

FAMILY = "retrieval"
TARGETS = ("idx", "diagonal")


def defaults() -> Config:
  """Defaults of retrieval (section 5.1): COCO, from a pre-trained model."""
  config = default_keys.fine_tuning("retrieval")
  config.num_epochs = 6.0
  config.retrieval = dict(
    **align.defaults(),
    alpha_ramp_epochs=1.0,
    # idx: all captions of an image are ITC positives; diagonal: only a pair's
    # own caption, as in the original until March 2022.
    itc_targets="idx",
    # Where ITM negatives are sampled from. global: the entire batch; local:
    # the same data shard.
    negatives="global",
  )
  # As in the original, whose queues start with features of pre-training.
  config.init.momentum_state = True
  config.data.max_length = 35
  config.evals.batch_size = 64
  config.evals.best = ("val/r_mean",)
  config.evals.val = default_keys.ranked_split("")
  config.evals.test = default_keys.ranked_split("")
  return config


def check(config: Config) -> None:
  """Checks the keys of `config.retrieval`; see `base.TaskFile`."""
  align.check(config)
  c, key = config.retrieval, "config.retrieval"
  run_config.one_of(f"{key}.itc_targets", c.itc_targets, TARGETS)
  run_config.one_of(f"{key}.negatives", c.negatives, run_config.SCOPES)


def example(
  config: Config,
  tokenizer: tokenizer.Tokenizer,
  image: examples.ImageTransform,
) -> examples.PairExample:
  """Image-text pairs with the ids of their images."""
  return base.pair_example(config, tokenizer, image, with_image_id=True)


def make(
  config: Config, model: blip.Blip, *, prompt_length: int, num_shards: int
) -> "Retrieval":
  """The task of a config; see `base.TaskFile`."""
  c = config.retrieval
  return Retrieval(
    model,
    negative_groups=num_shards if c.negatives == "local" else 1,
    itc_targets=c.itc_targets,
    **align.arguments(config, num_shards),
  )


@dataclasses.dataclass(frozen=True)
class Retrieval(align.Align):
  """The retrieval task.

  Attributes:
    negative_groups: number of groups within which ITM negatives are sampled.
      1 is the original's `negative_all_rank=True`; the number of data shards
      is `negative_all_rank=False`.
    itc_targets: "idx" makes all captions of an image ITC positives,
      "diagonal" only a pair's own caption, as the original did until March
      2022 and so, probably, when the released checkpoints were trained.
  """

  negative_groups: int = 1
  itc_targets: str = "idx"

  def init(self, rng: PRNGKeyArray) -> base.Params:
    return families.init("retrieval", self.model.config, rng)

  def init_momentum(
    self, params: base.Params, rng: PRNGKeyArray
  ) -> momentum_lib.Momentum:
    momentum = super().init_momentum(params, rng)
    # No image has this id, so the initial random features are not positives.
    idx_queue = jnp.full(self.queue_size, momentum_lib.NO_IMAGE, jnp.int32)
    return dataclasses.replace(momentum, idx_queue=idx_queue)

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

    The batch is that of pre-training, with image_id, int32 [B], which captions
    of one image share.  `params` must have been clamped (1).  There is no LM.
    """
    image, ids, mask = base.pixels(batch), *base.text(batch)
    image_id = batch["image_id"]
    key_negatives, key_dropout = jax.random.split(rng)
    run = base.passes(self.model, key_dropout, train)

    # 2-4. Online features, EMA, momentum features.
    features = self.features(run, params, momentum, image, ids, mask)

    # 5-7. ITC, then momentum features are added to the queue.
    alpha = momentum_lib.ramp(self.alpha, step, self.alpha_ramp_steps)
    if self.itc_targets == "idx":
      positives = align.Positives(image_id, momentum.idx_queue)
    else:
      positives = self.own_pairs(len(ids))
    loss_itc, _ = self.itc(features, params["temp"], alpha, positives)
    momentum = momentum_lib.enqueue(
      features.momentum,
      features.image_feat_m,
      features.text_feat_m,
      image_id,
    )

    # 8. ITM; both texts of an image share its keys and values.
    loss_itm, itm_acc = self.itm(
      run,
      params,
      features.image_embeds,
      self.image_kv(params, features.image_embeds),
      ids,
      mask,
      self._sample_negatives(key_negatives, features, params["temp"], image_id),
    )
    loss = loss_itc + loss_itm
    metrics = {
      "loss": loss,
      "loss_itc": loss_itc,
      "loss_itm": loss_itm,
      "itm_acc": itm_acc,
      "alpha": alpha,
      "temp": params["temp"],
    }
    return loss, (momentum, metrics)

  def _sample_negatives(self, key, features: align.Features, temp, image_id):
    """Hard negatives of other images, weighted by online similarities."""
    groups = self.negative_groups
    images = losses.grouped(features.image_feat, groups)
    texts = losses.grouped(features.text_feat, groups)
    sim_i2t = jnp.einsum("gic,gjc->gij", images, texts) / temp
    same = _same_image(image_id, groups)
    # As in the original, without the small constant of pre-training.
    weights = lambda sim: losses.hard_negative_weights(sim, same, constant=0.0)
    return self.negatives(key, weights(sim_i2t.mT), weights(sim_i2t))


def _same_image(
  image_id: Int[Array, " B"], groups: int
) -> Bool[Array, "G b b"]:
  """Which examples of a group have the same image."""
  image_id = losses.grouped(image_id, groups)
  return image_id[:, :, None] == image_id[:, None]
