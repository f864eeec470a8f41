"""ITC and ITM with a momentum twin: what pre-training and retrieval share.

A step of both follows the order that `tasks/momentum.py` numbers.

Dimensions: B batch, G groups of b rows (see `losses.grouped`), L text length,
C joint embedding, Q queue, K = b + Q candidates.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from blip_jax.config import Config
from blip_jax.models import blip
from blip_jax.tasks import base, losses
from blip_jax.tasks import momentum as momentum_lib


def defaults() -> dict[str, Any]:
  """Keys of the momentum encoders, which pre-training and retrieval share."""
  return dict(queue_size=57600, ema_decay=0.995, alpha=0.4)


def arguments(config: Config, num_shards: int) -> dict[str, Any]:
  """What `Align` takes from a config."""
  own = config[config.task]
  epochs = own.alpha_ramp_epochs
  return dict(
    queue_size=own.queue_size,
    ema_decay=own.ema_decay,
    alpha=own.alpha,
    alpha_ramp_steps=round(epochs * config.optim.steps_per_epoch),
    groups=num_shards if config.scope == "local" else 1,
    num_shards=num_shards,
  )


Sampler = Callable[[PRNGKeyArray, Float[Array, "G b b"]], Int[Array, "G b"]]


class Features(NamedTuple):
  """What student and twin see in a batch, and the twin after its EMA."""

  image_embeds: Float[Array, "B N D"]
  image_feat: Float[Array, "B C"]
  text_feat: Float[Array, "B C"]
  image_feat_m: Float[Array, "B C"]
  text_feat_m: Float[Array, "B C"]
  momentum: momentum_lib.Momentum


@dataclasses.dataclass(frozen=True)
class Align:
  """ITC and ITM.

  Attributes:
    model: with the parts of its family (`models/families.py`).
    queue_size: past features that ITC also compares with.
    ema_decay: of the momentum encoders' parameters.
    alpha: final weight of the twin's soft targets.
    alpha_ramp_steps: steps until `alpha` is reached.
    groups: rows of other groups are no ITC candidates; 1 is the whole batch,
      the number of data shards is the original.
    num_shards: data shards that the batch lies on.
    sample: picks a negative a row; tests inject recorded draws.
  """

  model: blip.Blip
  queue_size: int
  ema_decay: float
  alpha: float
  alpha_ramp_steps: int
  groups: int = 1
  num_shards: int = 1
  sample: Sampler = losses.sample_negatives

  def init_momentum(
    self, params: base.Params, rng: PRNGKeyArray
  ) -> momentum_lib.Momentum:
    embed_dim = self.model.config.embed_dim
    return momentum_lib.init(params, self.queue_size, embed_dim, rng)

  def clamp(self, params: base.Params) -> base.Params:
    return momentum_lib.clamp_temp(params)

  def features(
    self,
    run: Callable,
    params: base.Params,
    momentum: momentum_lib.Momentum,
    image: Float[Array, "B H W 3"],
    ids: Int[Array, "B L"],
    mask: Int[Array, "B L"],
  ) -> Features:
    """Steps 2-4: the student, then its twin after the twin's EMA."""
    image_embeds, image_feat = run(params, "image_features", image)
    text_feat = run(params, "text_feat", ids, mask)
    momentum = momentum_lib.ema(
      jax.lax.stop_gradient(params), momentum, self.ema_decay
    )
    twin = jax.lax.stop_gradient({**params, **momentum.params_m})
    _, image_feat_m = run(twin, "image_features", image)
    text_feat_m = run(twin, "text_feat", ids, mask)
    return Features(
      image_embeds, image_feat, text_feat, image_feat_m, text_feat_m, momentum
    )

  def itc(
    self,
    seen: Features,
    temp: Float[Array, ""],
    alpha: Float[Array, ""],
    hard: Float[Array, "B K"],
  ) -> tuple[Float[Array, ""], tuple[Float[Array, "B K"], ...]]:
    """Steps 5-6: against [the twin's features of the group; queue].

    Returns:
      The mean of both directions, and the student's similarities (i2t, t2i).
    """

    def compare(feat, feat_m, queue):
      in_group = jnp.einsum(
        "gic,gjc->gij",
        losses.grouped(feat, self.groups),
        losses.grouped(feat_m, self.groups),
      ).reshape(len(feat), -1)
      return jnp.concatenate([in_group, feat @ queue.T], axis=1)

    def similarities(image_feat, text_feat, temp):
      texts, images = seen.momentum.text_queue, seen.momentum.image_queue
      sim_i2t = compare(image_feat, seen.text_feat_m, texts)
      sim_t2i = compare(text_feat, seen.image_feat_m, images)
      return sim_i2t / temp, sim_t2i / temp

    sims = similarities(seen.image_feat, seen.text_feat, temp)
    sims_m = similarities(
      seen.image_feat_m, seen.text_feat_m, jax.lax.stop_gradient(temp)
    )
    directions = [
      losses.itc_loss(sim, momentum_lib.soft_targets(sim_m, hard, alpha))
      for sim, sim_m in zip(sims, sims_m, strict=True)
    ]
    return 0.5 * sum(directions), sims

  def diagonal(self, batch_size: int) -> Float[Array, "B K"]:
    """Hard targets where a row's one positive is its own pair."""
    rows = batch_size // self.groups
    own = jnp.eye(rows, rows + self.queue_size)
    return jnp.tile(own, (self.groups, 1))

  def negatives(
    self,
    key: PRNGKeyArray,
    weights_t2i: Float[Array, "G b b"],
    weights_i2t: Float[Array, "G b b"],
  ) -> list[tuple[Int[Array, "G b"], Bool[Array, " B"]]]:
    """Draws a negative image for each text, then a text for each image.

    Returns:
      Twice (its index in the group, whether the row has any).
    """
    keys = jax.random.split(key)
    return [
      (self.sample(key, weights), (weights.sum(-1) > 0).reshape(-1))
      for key, weights in zip(keys, (weights_t2i, weights_i2t), strict=True)
    ]

  def itm(
    self,
    run: Callable,
    params: base.Params,
    image_embeds: Float[Array, "B N D"],
    image_kv,
    ids: Int[Array, "B L"],
    mask: Int[Array, "B L"],
    negatives,
  ) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Step 8: true pairs, (negative image, text) and (image, negative text).

    Returns:
      The loss and its accuracy.
    """
    match = functools.partial(run, params, "match")
    (neg_image, has_image), (neg_text, has_text) = negatives
    if len(neg_image) == self.num_shards:
      take = lambda x: losses.take_in_group(x, neg_image)
      image_kv_neg = jax.tree.map(take, image_kv)
    else:
      # From other devices: one layer of tokens is less to send than keys and
      # values of all layers, and cheap to project again.
      image_kv_neg = self.image_kv(
        params, losses.take_in_group(image_embeds, neg_image)
      )
    # The true and the negative text of an image side by side, so that both
    # look at its one set of keys.
    both = lambda x: jnp.stack(
      [x, losses.take_in_group(x, neg_text)], axis=1
    ).reshape(-1, x.shape[-1])
    own_image = match(both(ids), both(mask), image_kv)
    other_image = match(ids, mask, image_kv_neg)
    return losses.classification_loss(
      jnp.concatenate([own_image[0::2], other_image, own_image[1::2]]),
      jnp.repeat(jnp.array([1, 0, 0]), len(ids)),
      jnp.concatenate([jnp.ones_like(has_image), has_image, has_text]),
    )

  def image_kv(self, params: base.Params, image_embeds):
    """Keys and values of images, for every text that looks at them."""
    return self.model.apply({"params": params}, image_embeds, method="image_kv")

  def full_params(self, params: base.Params) -> base.Params:
    """Stored parameters as the model takes them."""
    return params

  @property
  def predict_fns(self) -> dict[str, Callable]:
    return predict_fns(self.model, self.full_params)


def predict_fns(
  model: blip.Blip,
  full_params: Callable[[base.Params], base.Params] = lambda p: p,
) -> dict[str, Callable]:
  """What ranking and matching ask of a model, as functions of its parameters.

  Args:
    model: with the parts of a family that has projections and an ITM head.
    full_params: stored parameters as the model takes them.

  Returns:
    `image_features` of images or of videos, whose pixels are uint8 or
    normalised, `text_feat`, `image_kv` and `match`: `models.blip.Blip`'s.
  """

  def apply(params, *args, method, **kwargs):
    return model.apply(
      {"params": full_params(params)}, *args, method=method, **kwargs
    )

  def image_features(params, image):
    method = "video_features" if image.ndim == 5 else "image_features"
    return apply(params, base.pixels({"image": image}), method=method)

  names = "text_feat", "image_kv", "match"
  return {
    "image_features": image_features,
    **{name: functools.partial(apply, method=name) for name in names},
  }
