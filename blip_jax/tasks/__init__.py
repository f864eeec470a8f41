"""What a step computes: one file per training objective."""

from ml_collections import ConfigDict

from blip_jax.models import blip
from blip_jax.models import config as config_lib
from blip_jax.tasks import base, caption, pretrain, retrieval


def build(
  config: ConfigDict,
  *,
  vocab_size: int,
  tokens: config_lib.SpecialTokens,
  prompt_length: int,
  num_shards: int,
  num_tensor: int,
) -> base.Task:
  """The task that a config asks for.

  Args:
    config: see `blip_jax/defaults.py`.
    vocab_size: of the tokenizer.
    tokens: its special ids.
    prompt_length: tokens of the config's prompt, [DEC] included; 1 for none.
    num_shards: pieces that the batch is split into over the mesh.
    num_tensor: pieces that attention heads are split into.

  Raises:
    ValueError: the model does not exist, or its heads do not split.
  """
  c = config.model
  vit = {"patch_size": c.patch_size, "drop_path": c.drop_path}
  model = blip.Blip(
    config_lib.variant(
      c.variant,
      image_size=c.image_size,
      vocab_size=vocab_size,
      tokens=tokens,
      dtype=c.dtype,
      vit={
        "remat": c.vit_remat,
        **{key: value for key, value in vit.items() if value is not None},
      },
      med={"dropout": c.dropout, "remat": c.text_remat},
    )
  )
  for tower in (model.config.vit, model.config.med):
    if tower.num_heads % num_tensor:
      raise ValueError(
        f"config.mesh.tensor: {tower.num_heads} attention heads of variant "
        f"{c.variant!r} do not split over {num_tensor} devices"
      )
  groups = num_shards if config.scope == "local" else 1
  if config.task == "caption":
    return caption.Caption(
      model,
      prompt_length=prompt_length,
      label_smoothing=config.caption.label_smoothing,
      groups=groups,
    )
  own = config[config.task]
  twin = dict(
    queue_size=own.queue_size,
    momentum=own.momentum,
    alpha=own.alpha,
    alpha_ramp_steps=round(
      own.alpha_ramp_epochs * config.optim.steps_per_epoch
    ),
    groups=groups,
    num_shards=num_shards,
  )
  if config.task == "retrieval":
    return retrieval.Retrieval(
      model,
      negative_groups=num_shards if own.negatives == "local" else 1,
      itc_targets=own.itc_targets,
      **twin,
    )
  return pretrain.Pretrain(
    model,
    label_smoothing=own.label_smoothing,
    loss_weights=tuple(own.loss_weights),
    **twin,
  )
