"""ITC and ITM with momentum encoders, shared by pre-training and retrieval.

Both follow the numbered order of a step in `tasks/momentum.py`.

Dimensions: B batch, H and W image height and width, G groups of b examples (see
`losses.grouped`), L text length, N image tokens, D image width, C joint
embedding, Q queue, K = b + Q candidates.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from blip_jax.models import blip
from blip_jax.runtime import config as run_config
from blip_jax.runtime.config import Config
from blip_jax.tasks import base, exchange, losses
from blip_jax.tasks import momentum as momentum_lib

# Rows of a shard whose similarities ITC has in memory at a time.
BLOCK_ROWS = 128


def defaults() -> dict[str, Any]:
  """Default config keys that pre-training and retrieval share."""
  return dict(queue_size=57600, ema_decay=0.995, alpha=0.4)


def check(config: Config) -> None:
  """Checks the keys that pre-training and retrieval share.

  Raises:
    ValueError: names the key, the allowed values, and the value found.
  """
  run_config.at_least(1, config, f"{config.task}.queue_size")
  if config.grad_accum_steps > 1:
    raise ValueError(
      f"config.grad_accum_steps: {config.task} compares each example with all "
      "others of its batch (ITC, and the hard negatives of ITM), so that "
      "micro-batches would train on fewer and easier negatives; found "
      f"{config.grad_accum_steps}, expected 1. To save memory, use "
      "config.model.vit_remat=full and text_remat=full, "
      "config.optim.moment_dtype=bfloat16, or more devices, with "
      "config.mesh.fsdp"
    )


def arguments(config: Config, num_shards: int) -> dict[str, Any]:
  """The fields of `Align` for a config and a number of data shards."""
  c = config[config.task]
  ramp_steps = round(c.alpha_ramp_epochs * config.optim.steps_per_epoch)
  return dict(
    queue_size=c.queue_size,
    ema_decay=c.ema_decay,
    alpha=c.alpha,
    alpha_ramp_steps=ramp_steps,
    groups=num_shards if config.scope == "local" else 1,
    num_shards=num_shards,
  )


# (key, weights) -> the index of a negative for each example.
Sampler = Callable[[PRNGKeyArray, Float[Array, "G b b"]], Int[Array, "G b"]]


class Features(NamedTuple):
  """Online and momentum (`_m`) features, and the state after the EMA."""

  image_embeds: Float[Array, "B N D"]
  image_feat: Float[Array, "B C"]
  text_feat: Float[Array, "B C"]
  image_feat_m: Float[Array, "B C"]
  text_feat_m: Float[Array, "B C"]
  momentum: momentum_lib.Momentum


class Positives(NamedTuple):
  """Equal ids make an example and a candidate of ITC a positive pair.

  Attributes:
    ids: of the batch, not negative.
    queue_ids: of the entries of the queues.
  """

  ids: Int[Array, " B"]
  queue_ids: Int[Array, " Q"]


def hard_targets(
  ids: Int[Array, "G n"], group: Int[Array, "G b"], queue: Int[Array, " Q"]
) -> Float[Array, "G n K"]:
  """Equal probabilities for all positives of each of some examples.

  Args:
    ids: of the examples, which are in the batch.
    group: ids of the batch.
    queue: ids of the queues.
  """
  in_group = ids[:, :, None] == group[:, None]
  in_queue = ids[:, :, None] == queue[None, None]
  positive = jnp.concatenate([in_group, in_queue], -1).astype(jnp.float32)
  return positive / positive.sum(-1, keepdims=True)


def _compare(
  rows: Float[Array, "G n C"],
  group: Float[Array, "G b C"],
  queue: Float[Array, "Q C"],
) -> Float[Array, "G n K"]:
  in_group = jnp.einsum("gic,gjc->gij", rows, group)
  return jnp.concatenate([in_group, rows @ queue.T], axis=-1)


@dataclasses.dataclass(frozen=True)
class Align:
  """ITC and ITM.

  Attributes:
    model: the module.
    queue_size: number of past features that are also ITC candidates.
    ema_decay: decay rate of the momentum encoders' parameters.
    alpha: final weight of the soft targets.
    alpha_ramp_steps: number of steps until `alpha` is reached.
    groups: number of groups; ITC compares examples of the batch only within
      their group. 1 is the entire batch; the original has one group per data
      shard.
    num_shards: number of data shards over which the batch is split.
    sample: samples a negative for each example; tests inject recorded ones.
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
    """Step 1."""
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
    """Steps 2-4: online features, EMA, momentum features.

    Args:
      run: from `base.passes`.
      params: complete online parameters.
      momentum: the state before the step.
      image: normalised pixels.
      ids: captions.
      mask: 1 on tokens, 0 on padding.
    """
    image_embeds, image_feat = run(params, "image_features", image)
    text_feat = run(params, "text_feat", ids, mask)
    momentum = momentum_lib.ema(
      jax.lax.stop_gradient(params), momentum, self.ema_decay
    )
    params_m = jax.lax.stop_gradient({**params, **momentum.params_m})
    _, image_feat_m = run(params_m, "image_features", image)
    text_feat_m = run(params_m, "text_feat", ids, mask)
    return Features(
      image_embeds, image_feat, text_feat, image_feat_m, text_feat_m, momentum
    )

  def itc(
    self,
    features: Features,
    temp: Float[Array, ""],
    alpha: Float[Array, ""],
    positives: Positives,
  ) -> tuple[Float[Array, ""], tuple[Float[Array, "B b"], ...]]:
    """Steps 5-6: ITC against [momentum features of the group; queue].

    Similarities of all rows with the queue would be the largest arrays of a
    step with a large batch. Those of a block of rows exist at a time, and
    again in the backward pass.

    Args:
      features: of the batch.
      temp: temperature.
      alpha: weight of the soft targets.
      positives: which candidates belong to which examples.

    Returns:
      The mean loss of both directions, and the online similarities with the
      group (image-to-text, text-to-image), divided by `temp`.
    """
    queues = features.momentum
    in_group = lambda x: losses.grouped(x, self.groups)
    texts = in_group(features.text_feat_m), queues.text_queue
    images = in_group(features.image_feat_m), queues.image_queue
    candidate_ids = in_group(positives.ids), positives.queue_ids

    def block(rows):
      image, text, image_m, text_m, ids = rows
      hard = hard_targets(ids, *candidate_ids)
      total, sims = jnp.float32(0), []
      for mine, mine_m, (group, queue) in (
        (image, image_m, texts),
        (text, text_m, images),
      ):
        sim = _compare(mine, group, queue) / temp
        sim_m = _compare(mine_m, group, queue) / jax.lax.stop_gradient(temp)
        targets = momentum_lib.soft_targets(sim_m, hard, alpha)
        total += 0.5 * losses.itc_loss(sim, targets) * (sim[..., 0].size)
        sims.append(sim[..., : group.shape[1]])
      return total, tuple(sims)

    batch_size = len(positives.ids)
    shape = self._blocks(batch_size)
    rows = (
      features.image_feat,
      features.text_feat,
      features.image_feat_m,
      features.text_feat_m,
      positives.ids,
    )
    # [shards, blocks, rows of each] -> [blocks, groups, rows of each]
    split = lambda x: jnp.swapaxes(
      x.reshape(*shape, *x.shape[1:]), 0, 1
    ).reshape(shape[1], self.groups, -1, *x.shape[1:])
    join = lambda x: jnp.swapaxes(
      x.reshape(shape[1], shape[0], shape[2], -1), 0, 1
    ).reshape(batch_size, -1)
    block = jax.checkpoint(block) if shape[1] > 1 else block
    totals, sims = jax.lax.map(block, jax.tree.map(split, rows))
    return jnp.sum(totals) / batch_size, jax.tree.map(join, sims)

  def _blocks(self, batch_size: int) -> tuple[int, int, int]:
    """Numbers of shards, of blocks, and of rows that a shard has of each."""
    shards = max(self.groups, self.num_shards)
    shards = shards if batch_size % shards == 0 else self.groups
    size = batch_size // shards
    rows = max(n for n in range(1, BLOCK_ROWS + 1) if size % n == 0)
    return shards, size // rows, rows

  def own_pairs(self, batch_size: int) -> Positives:
    """If the only positive of an example is its own pair."""
    nobody = jnp.full(self.queue_size, momentum_lib.NO_IMAGE)
    return Positives(jnp.arange(batch_size), nobody)

  def negatives(
    self,
    key: PRNGKeyArray,
    weights_t2i: Float[Array, "G b b"],
    weights_i2t: Float[Array, "G b b"],
  ) -> list[tuple[Int[Array, "G b"], Bool[Array, " B"]]]:
    """Samples a negative image for each text, then a text for each image.

    Args:
      key: for sampling.
      weights_t2i: weights of the images for each text.
      weights_i2t: weights of the texts for each image.

    Returns:
      For negative images, then texts: (index within the group, whether the
      example has any negative).
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
    """Step 8: ITM of pairs, (negative image, text) and (image, negative text).

    Args:
      run: from `base.passes`.
      params: complete online parameters.
      image_embeds: image tokens.
      image_kv: their keys and values.
      ids: captions.
      mask: 1 on tokens, 0 on padding.
      negatives: from `negatives`.

    Returns:
      Loss and accuracy.
    """
    match = functools.partial(run, params, "match")
    (neg_image, has_image), (neg_text, has_text) = negatives
    if len(neg_image) % self.num_shards == 0:
      take = lambda x: losses.take_in_group(x, neg_image)
      image_kv_neg = jax.tree.map(jax.vmap(take), image_kv)
    else:
      # Negatives may be on other devices.  Image tokens are smaller to send
      # than the keys and values of all layers, which are cheap to recompute.
      image_kv_neg = self.image_kv(
        params, exchange.take(image_embeds, neg_image)
      )
    # The matching and the negative text of an image are adjacent, so that both
    # attend to the same keys and values.
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
    """Keys and values of images, for all texts that attend to them."""
    return self.model.apply({"params": params}, image_embeds, method="image_kv")

  def full_params(self, params: base.Params) -> base.Params:
    """Completes stored parameters for the model; see `tying.tie`."""
    return params

  @property
  def predict_fns(self) -> dict[str, Callable]:
    return predict_fns(self.model, self.full_params)


def predict_fns(
  model: blip.Blip,
  full_params: Callable[[base.Params], base.Params] = lambda p: p,
) -> dict[str, Callable]:
  """Functions for ranking and matching, of (parameters, arrays).

  Args:
    model: of a family with projections and an ITM head.
    full_params: completes stored parameters for the model.

  Returns:
    `text_feat`, `image_kv` and `match` of `models.blip.Blip`, and
    `image_features`, which takes images or videos with pixels as uint8 or
    normalised.
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
