"""Pre-training: ITC, ITM and LM from one image-text pair (paper, 3.2).

Dimensions: B batch, G groups of b rows (see `losses.grouped`), L text length,
C joint embedding, Q queue, K = b + Q candidates.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from blip_jax.models import blip, generation, med
from blip_jax.tasks import base, losses
from blip_jax.tasks import momentum as momentum_lib

Draw = Callable[[PRNGKeyArray, Float[Array, "G b b"]], Int[Array, "G b"]]


@dataclasses.dataclass(frozen=True)
class Pretrain:
  """The pre-training task.

  Attributes:
    model: both text towers; stored parameters leave out what they share.
    queue_size: past features that ITC also compares with.
    momentum: decay of the twin's parameters.
    alpha: final weight of the twin's soft targets.
    alpha_ramp_steps: steps until `alpha` is reached.
    label_smoothing: of LM.
    loss_weights: of (ITC, ITM, LM).
    groups: rows of other groups are neither ITC candidates nor ITM negatives;
      1 is the whole batch, the number of data shards is the original.
    num_shards: data shards that the batch lies on.
    draw: picks a negative a row; tests inject recorded draws.
  """

  model: blip.Blip
  queue_size: int
  momentum: float
  alpha: float
  alpha_ramp_steps: int
  label_smoothing: float = 0.1
  loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
  groups: int = 1
  num_shards: int = 1
  draw: Draw = losses.draw_negatives

  def init(self, rng: PRNGKeyArray, batch: base.Batch) -> base.Params:
    image = base.normalise(batch["image"])
    text = batch["input_ids"], batch["attention_mask"]
    init = functools.partial(self.model.init, method="init_all")
    return med.drop_tied(init(rng, image, *text)["params"])

  def init_momentum(
    self, params: base.Params, rng: PRNGKeyArray
  ) -> momentum_lib.Momentum:
    embed_dim = self.model.config.embed_dim
    return momentum_lib.init(params, self.queue_size, embed_dim, rng)

  def project(self, params: base.Params) -> base.Params:
    return momentum_lib.clamp_temp(params)

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
    """One step in the order that `tasks/momentum.py` numbers.

    Batch: image uint8 [B, H, W, 3], or float32 if already normalised;
    input_ids and attention_mask [B, L].  `params` went through `project` (1).
    """
    self._check(batch)
    image, ids, mask = _inputs(batch)
    key_negatives, key_dropout = jax.random.split(rng)
    run = self._passes(key_dropout, train)

    # 2-4. Student, then its twin after the twin's EMA.
    full = med.tie(params)
    image_embeds, image_feat = run(full, "image_features", image)
    text_feat = run(full, "text_feat", ids, mask)
    momentum = momentum_lib.ema(
      jax.lax.stop_gradient(full), momentum, self.momentum
    )
    twin = jax.lax.stop_gradient({**full, **momentum.params_m})
    _, image_feat_m = run(twin, "image_features", image)
    text_feat_m = run(twin, "text_feat", ids, mask)

    # 5-7. ITC against the twin's features, which then join the queue.
    alpha = momentum_lib.ramp(self.alpha, step, self.alpha_ramp_steps)
    similarities = self._candidates(image_feat_m, text_feat_m, momentum)
    sims = similarities(image_feat, text_feat, params["temp"])
    sims_m = similarities(
      image_feat_m, text_feat_m, jax.lax.stop_gradient(params["temp"])
    )
    loss_itc = self._itc(sims, sims_m, alpha)
    momentum = momentum_lib.enqueue(momentum, image_feat_m, text_feat_m)

    # 8-9. One projection of the image serves all three texts that look at it.
    project = functools.partial(
      self.model.apply, {"params": full}, method="project_image"
    )
    image_kv = project(image_embeds)
    loss_itm, itm_acc = self._itm(
      functools.partial(run, full, "match"),
      project,
      image_embeds,
      image_kv,
      ids,
      mask,
      self._draw(key_negatives, sims),
    )
    lm_loss = functools.partial(
      losses.lm_loss,
      run(full, "decode", ids, mask, image_kv),
      jnp.where(mask == 1, ids, losses.IGNORE),
      groups=self.groups,
    )
    loss_lm = lm_loss(self.label_smoothing)

    parts = loss_itc, loss_itm, loss_lm
    loss = sum(w * x for w, x in zip(self.loss_weights, parts, strict=True))
    metrics = {
      "loss": loss,
      "loss_itc": loss_itc,
      "loss_itm": loss_itm,
      "loss_lm": loss_lm,
      # Without smoothing: what a perplexity is made of.
      "nll_lm": lm_loss(0.0),
      "itm_acc": itm_acc,
      "alpha": alpha,
      "temp": params["temp"],
    }
    return loss, (momentum, metrics)

  @property
  def predict_fns(self) -> dict[str, Callable]:
    return {
      "image_features": self._image_features,
      "text_feat": self._text_feat,
      "match": self._match,
      "caption": self._caption,
    }

  def _image_features(self, params, image):
    """uint8 images to (image_embeds, image_feat)."""
    return self.model.apply(
      {"params": med.tie(params)},
      base.normalise(image),
      method="image_features",
    )

  def _text_feat(self, params, input_ids, attention_mask):
    return self.model.apply(
      {"params": med.tie(params)}, input_ids, attention_mask, method="text_feat"
    )

  def _match(self, params, image_embeds, input_ids, attention_mask):
    """ITM logits [B, 2] of B texts with their B/I-th image."""
    variables = {"params": med.tie(params)}
    kv = self.model.apply(variables, image_embeds, method="project_image")
    return self.model.apply(
      variables, input_ids, attention_mask, kv, method="match"
    )

  def _caption(self, params, image, max_length: int):
    """Greedy captions as ids [B, max_length], from [DEC] alone."""
    variables = {"params": med.tie(params)}
    apply = functools.partial(self.model.apply, variables)
    embeds = apply(base.normalise(image), method="encode_image")
    image_kv = apply(embeds, method="project_image_for_decoder")
    tokens = self.model.config.med.tokens
    return generation.greedy(
      lambda ids, cache: apply(ids, cache, image_kv, method="extend"),
      apply(len(image), max_length, method="init_cache"),
      jnp.full((len(image), 1), tokens.dec, jnp.int32),
      max_length,
      tokens.sep,
      tokens.pad,
    )

  def _check(self, batch: base.Batch) -> None:
    size = len(batch["input_ids"])
    if size % self.groups or size // self.groups < 2:
      raise ValueError(
        f"config.batch_size: {size} rows in {self.groups} group(s) leave some "
        "row without a negative; give every group at least 2 rows (a larger "
        "batch_size, or config.scope='global' for one group)"
      )

  def _passes(self, key: PRNGKeyArray, train: bool) -> Callable:
    """Applies a method of the model, each time with dropout of its own."""
    keys = iter(jax.random.split(key, 7))

    def run(params, method, *args):
      return self.model.apply(
        {"params": params},
        *args,
        not train,
        method=method,
        rngs={"dropout": next(keys)},
      )

    return run

  def _candidates(self, image_feat_m, text_feat_m, momentum):
    """Compares features with [the twin's features of the group; queue]."""

    def compare(feat, feat_m, queue):
      in_group = jnp.einsum(
        "gic,gjc->gij",
        losses.grouped(feat, self.groups),
        losses.grouped(feat_m, self.groups),
      ).reshape(len(feat), -1)
      return jnp.concatenate([in_group, feat @ queue.T], axis=1)

    def similarities(image_feat, text_feat, temp):
      sim_i2t = compare(image_feat, text_feat_m, momentum.text_queue)
      sim_t2i = compare(text_feat, image_feat_m, momentum.image_queue)
      return sim_i2t / temp, sim_t2i / temp

    return similarities

  def _itc(self, sims, sims_m, alpha) -> Float[Array, ""]:
    """Mean of both directions, with the twin's opinion in the targets."""
    batch_size, candidates = sims[0].shape
    own = jnp.eye(batch_size // self.groups, candidates)
    hard = jnp.tile(own, (self.groups, 1))
    directions = [
      losses.itc_loss(sim, momentum_lib.soft_targets(sim_m, hard, alpha))
      for sim, sim_m in zip(sims, sims_m, strict=True)
    ]
    return 0.5 * sum(directions)

  def _draw(self, key, sims):
    """For each row a negative image and a negative text of its group.

    Returns:
      (index [G, b], whether there is any [B]) of the images, then the texts.
    """
    sim_i2t, sim_t2i = sims
    negatives = []
    keys = jax.random.split(key)
    for key, sim in zip(keys, (sim_t2i, sim_i2t), strict=True):
      in_group = losses.grouped(sim[:, : len(sim) // self.groups], self.groups)
      weights = losses.hard_negative_weights(jax.lax.stop_gradient(in_group))
      has_any = (weights.sum(-1) > 0).reshape(-1)
      negatives.append((self.draw(key, weights), has_any))
    return negatives

  def _itm(self, match, project, image_embeds, image_kv, ids, mask, negatives):
    """True pairs, (negative image, text) and (image, negative text)."""
    (neg_image, has_image), (neg_text, has_text) = negatives
    if self.groups == self.num_shards:
      take = lambda x: losses.take_in_group(x, neg_image)
      image_kv_neg = jax.tree.map(take, image_kv)
    else:
      # From other devices: one layer of tokens is less to send than keys and
      # values of all layers, and cheap to project again.
      image_kv_neg = project(losses.take_in_group(image_embeds, neg_image))
    # The true and the negative text of an image side by side, so that both
    # look at its one set of keys.
    both = lambda x: jnp.stack(
      [x, losses.take_in_group(x, neg_text)], axis=1
    ).reshape(-1, x.shape[-1])
    own_image = match(both(ids), both(mask), image_kv)
    other_image = match(ids, mask, image_kv_neg)
    return losses.itm_loss(
      jnp.concatenate([own_image[0::2], other_image, own_image[1::2]]),
      jnp.repeat(jnp.array([1, 0, 0]), len(ids)),
      jnp.concatenate([jnp.ones_like(has_image), has_image, has_text]),
    )


def _inputs(batch: base.Batch):
  """Normalised pixels, token ids and their mask."""
  image = batch["image"]
  if image.dtype == jnp.uint8:
    image = base.normalise(image)
  return image, batch["input_ids"], batch["attention_mask"]
