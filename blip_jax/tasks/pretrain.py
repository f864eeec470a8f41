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
    ids, mask = batch["input_ids"], batch["attention_mask"]
    image = batch["image"]
    if image.dtype == jnp.uint8:
      image = base.normalise(image)
    key_neg_image, key_neg_text, *keys = jax.random.split(rng, 10)
    dropout = iter(keys)

    def run(params, method, *args):
      """One pass, with dropout of its own."""
      rngs = {"dropout": next(dropout)}
      variables = {"params": params}
      return self.model.apply(
        variables, *args, not train, method=method, rngs=rngs
      )

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

    # 5-7. The student is compared with the *twin's* candidates.
    alpha = momentum_lib.ramp(self.alpha, step, self.alpha_ramp_steps)
    candidates = self._candidates(image_feat_m, text_feat_m, momentum)
    sim_i2t, sim_t2i = candidates(image_feat, text_feat, params["temp"])
    teacher = candidates(
      image_feat_m, text_feat_m, jax.lax.stop_gradient(params["temp"])
    )
    hard = self._hard_targets(sim_i2t.shape)
    loss_itc = 0.5 * sum(
      losses.itc_loss(sim, momentum_lib.soft_targets(sim_m, hard, alpha))
      for sim, sim_m in zip((sim_i2t, sim_t2i), teacher, strict=True)
    )
    momentum = momentum_lib.enqueue(momentum, image_feat_m, text_feat_m)

    # 8. Image keys and values serve the positive, the negative text and LM.
    project = functools.partial(
      self.model.apply, {"params": full}, method="project_image"
    )
    image_kv = project(image_embeds)
    neg_image, valid_t2i = self._draw(key_neg_image, sim_t2i)
    neg_text, valid_i2t = self._draw(key_neg_text, sim_i2t)
    if self.groups == self.num_shards:
      take = lambda x: losses.take_in_group(x, neg_image)
      image_kv_neg = jax.tree.map(take, image_kv)
    else:
      # From other devices: one layer of tokens is less to send than keys and
      # values of all layers, and cheap to project again.
      image_kv_neg = project(losses.take_in_group(image_embeds, neg_image))
    with_negative_text = lambda x: jnp.stack(
      [x, losses.take_in_group(x, neg_text)], axis=1
    ).reshape(-1, x.shape[-1])
    own_image = run(
      full,
      "match",
      with_negative_text(ids),
      with_negative_text(mask),
      image_kv,
    )
    neg_image_logits = run(full, "match", ids, mask, image_kv_neg)
    itm_logits = jnp.concatenate(
      [own_image[0::2], neg_image_logits, own_image[1::2]]
    )
    itm_labels = jnp.repeat(jnp.array([1, 0, 0]), len(ids))
    itm_valid = jnp.concatenate(
      [jnp.ones_like(valid_t2i), valid_t2i, valid_i2t]
    )
    loss_itm, itm_acc = losses.itm_loss(itm_logits, itm_labels, itm_valid)

    # 9. Every token but the first is to be written.
    lm_labels = jnp.where(mask == 1, ids, losses.IGNORE)
    lm_logits = run(full, "decode", ids, mask, image_kv)
    lm_loss = functools.partial(
      losses.lm_loss, lm_logits, lm_labels, groups=self.groups
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

  def _candidates(self, image_feat_m, text_feat_m, momentum):
    """Similarities of features with [the twin's group; queue]."""

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

  def _hard_targets(self, shape: tuple[int, int]) -> Float[Array, "B K"]:
    group_size = shape[0] // self.groups
    return jnp.tile(jnp.eye(group_size, shape[1]), (self.groups, 1))

  def _draw(self, key, sim):
    """A negative for each row, and whether the row has any."""
    group_size = len(sim) // self.groups
    in_group = losses.grouped(sim[:, :group_size], self.groups)
    weights = losses.hard_negative_weights(jax.lax.stop_gradient(in_group))
    return self.draw(key, weights), (weights.sum(-1) > 0).reshape(-1)
