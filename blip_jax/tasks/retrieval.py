"""Retrieval fine-tuning: ITC and ITM where captions share images (paper, 5.1).

Dimensions: B batch, G groups of b rows, L text length, Q queue, K = b + Q.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from blip_jax import config as run_config
from blip_jax import defaults as default_keys
from blip_jax.config import Config
from blip_jax.data import examples, tokenizer
from blip_jax.models import blip, families
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
    # idx: all captions of an image are positives of ITC; diagonal: a pair's
    # own alone, as in the original until March 2022.
    itc_targets="idx",
    # Which rows may be ITM negatives: those of the whole batch, or those of
    # the same data shard.
    negatives="global",
  )
  # As in the original, whose queue starts with pre-training's features.
  config.init.momentum_state = True
  config.data.max_length = 35
  config.evals.batch_size = 64
  config.evals.best = ("val/r_mean",)
  config.evals.val = default_keys.ranked_split("")
  config.evals.test = default_keys.ranked_split("")
  return config


def check(config: Config) -> None:
  run_config.positive(config, "retrieval.queue_size")
  own, key = config.retrieval, "config.retrieval"
  run_config.one_of(f"{key}.itc_targets", own.itc_targets, TARGETS)
  run_config.one_of(f"{key}.negatives", own.negatives, run_config.SCOPES)


def example(
  config: Config,
  tokenizer: tokenizer.Tokenizer,
  image: examples.ImageTransform,
) -> examples.PairExample:
  return base.pair_example(config, tokenizer, image, with_image_id=True)


def make(
  config: Config, model: blip.Blip, *, prompt_length: int, num_shards: int
) -> "Retrieval":
  own = config.retrieval
  return Retrieval(
    model,
    negative_groups=num_shards if own.negatives == "local" else 1,
    itc_targets=own.itc_targets,
    **align.arguments(config, num_shards),
  )


@dataclasses.dataclass(frozen=True)
class Retrieval(align.Align):
  """The retrieval task: every caption of an image is a positive of it.

  Attributes:
    negative_groups: rows of other groups are no ITM negatives; 1 is the
      original's `negative_all_rank`, the number of data shards its absence.
    itc_targets: "idx" takes all captions of an image for positives of ITC,
      "diagonal" a pair's own alone, as the original did until March 2022 and
      so, probably, when the released checkpoints were trained.
  """

  negative_groups: int = 1
  itc_targets: str = "idx"

  def init(self, rng: PRNGKeyArray) -> base.Params:
    return families.init("retrieval", self.model.config, rng)

  def init_momentum(
    self, params: base.Params, rng: PRNGKeyArray
  ) -> momentum_lib.Momentum:
    momentum = super().init_momentum(params, rng)
    # No image has this id, so that random features are nobody's positives.
    return momentum.replace(
      idx_queue=jnp.full(self.queue_size, momentum_lib.NO_IMAGE, jnp.int32)
    )

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
    """One step in the order that `tasks/momentum.py` numbers, without LM.

    Batch: as in pre-training, and image_id [B], equal for captions of one
    image.  `params` went through `clamp` (1).
    """
    image, ids, mask = base.pixels(batch), *base.text(batch)
    image_id = batch["image_id"]
    key_negatives, key_dropout = jax.random.split(rng)
    run = base.passes(self.model, key_dropout, train)

    # 2-4. Student, then its twin after the twin's EMA.
    seen = self.features(run, params, momentum, image, ids, mask)

    # 5-7. ITC against the twin's features, which then join the queue.
    alpha = momentum_lib.ramp(self.alpha, step, self.alpha_ramp_steps)
    if self.itc_targets == "idx":
      hard = self._hard(image_id, momentum.idx_queue)
    else:
      hard = self.diagonal(len(ids))
    loss_itc, _ = self.itc(seen, params["temp"], alpha, hard)
    momentum = momentum_lib.enqueue(
      seen.momentum, seen.image_feat_m, seen.text_feat_m, image_id
    )

    # 8. One projection of the image serves both texts that look at it.
    loss_itm, itm_acc = self.itm(
      run,
      params,
      seen.image_embeds,
      self.image_kv(params, seen.image_embeds),
      ids,
      mask,
      self._draw(key_negatives, seen, params["temp"], image_id),
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

  def _hard(
    self, image_id: Int[Array, " B"], idx_queue: Int[Array, " Q"]
  ) -> Float[Array, "B K"]:
    """All candidates of the same image share the mass."""
    in_group = _same(image_id, self.groups).reshape(len(image_id), -1)
    in_queue = image_id[:, None] == idx_queue[None]
    positive = jnp.concatenate([in_group, in_queue], axis=1).astype(jnp.float32)
    return positive / positive.sum(axis=1, keepdims=True)

  def _draw(self, key, seen: align.Features, temp, image_id):
    """Negatives by the student's own similarities, never of the same image."""
    groups = self.negative_groups
    images = losses.grouped(seen.image_feat, groups)
    texts = losses.grouped(seen.text_feat, groups)
    sim_i2t = jnp.einsum("gic,gjc->gij", images, texts) / temp
    same = _same(image_id, groups)
    weigh = lambda sim: losses.hard_negative_weights(sim, same, constant=0.0)
    return self.negatives(key, weigh(sim_i2t.mT), weigh(sim_i2t))


def _same(image_id: Int[Array, " B"], groups: int) -> Bool[Array, "G b b"]:
  """Which rows of a group have the same image."""
  image_id = losses.grouped(image_id, groups)
  return image_id[:, :, None] == image_id[:, None]
