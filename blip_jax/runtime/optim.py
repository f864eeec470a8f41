"""BLIP's learning-rate schedules, and AdamW as PyTorch defines it."""

import math
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

SCHEDULES = ("step", "cosine_epoch", "cosine")
MOMENT_DTYPES = ("float32", "bfloat16")


def warmup_lr(
  step: int, *, lr: float, warmup_lr: float, warmup_steps: int
) -> float:
  """BLIP's warm-up: `lr` is first reached at step `warmup_steps` itself.

  With `warmup_steps` 0 it is reached at step 1, as in the original.
  """
  return min(lr, warmup_lr + (lr - warmup_lr) * step / max(warmup_steps, 1))


def step_lr(
  epoch: int, *, lr: float, min_lr: float, decay_rate: float
) -> float:
  """BLIP's pre-training decay: exponential in the epoch, with a floor."""
  return max(min_lr, lr * decay_rate**epoch)


def cosine_lr(epoch: int, *, lr: float, min_lr: float, epochs: int) -> float:
  """BLIP's fine-tuning decay: one epoch more would reach `min_lr`."""
  cosine = math.cos(math.pi * epoch / epochs)
  return min_lr + (lr - min_lr) * 0.5 * (1.0 + cosine)


def schedule(config: Any, num_steps: int) -> optax.Schedule:
  """Builds `step -> learning rate`, for the update that makes step + 1.

  `config.schedule` is one of:
    step          pre-training (paper section 4.1). Epoch 0 rises linearly from
                  `warmup_lr` to `lr` over `warmup_steps` and stays there; every
                  later epoch e keeps max(min_lr, lr * decay_rate**e). Warm-up
                  happens in epoch 0 only: if that has fewer steps it is cut
                  short, and the rate jumps when epoch 1 begins.
    cosine_epoch  fine-tuning: a cosine that is constant within an epoch, so the
                  last epoch is above `min_lr`. No warm-up.
    cosine        for short runs: linear warm-up from `warmup_lr`, then a smooth
                  cosine that reaches `min_lr` at `num_steps`.

  The rate of each epoch is computed here in float64, and the compiled step
  looks it up. Powers in float32 would be off by 1e-6 after some tens of epochs;
  these are the nearest float32 values, and warm-up is within 2e-7.

  Raises:
    ValueError: the schedule is unknown, or its numbers are impossible.
  """
  if config.schedule not in SCHEDULES:
    raise ValueError(
      f"config.optim.schedule must be one of {SCHEDULES}, "
      f"found {config.schedule!r}"
    )
  if config.schedule == "cosine":
    return _cosine(config, num_steps)
  if config.steps_per_epoch < 1:
    raise ValueError(
      f"config.optim.steps_per_epoch must be at least 1 for the schedule "
      f"{config.schedule!r}, found {config.steps_per_epoch}"
    )
  epochs = math.ceil(num_steps / config.steps_per_epoch)
  if config.schedule == "step":
    rates = [
      step_lr(
        epoch,
        lr=config.lr,
        min_lr=config.min_lr,
        decay_rate=config.decay_rate,
      )
      for epoch in range(epochs + 1)
    ]
  else:
    rates = [
      cosine_lr(epoch, lr=config.lr, min_lr=config.min_lr, epochs=epochs)
      for epoch in range(epochs + 1)
    ]

  def rate(step: Any) -> Float[Array, ""]:
    table = jnp.asarray(rates, jnp.float32)
    epoch = jnp.minimum(step // config.steps_per_epoch, epochs)
    if config.schedule == "cosine_epoch":
      return table[epoch]
    ramp = jnp.asarray(step, jnp.float32) / max(config.warmup_steps, 1)
    warm = config.warmup_lr + (config.lr - config.warmup_lr) * ramp
    return jnp.where(epoch == 0, jnp.minimum(warm, table[0]), table[epoch])

  return rate


def _cosine(config: Any, num_steps: int) -> optax.Schedule:
  if not 0 <= config.warmup_steps < num_steps:
    raise ValueError(
      f"config.optim.warmup_steps must be below config.num_steps="
      f"{num_steps}, found {config.warmup_steps}"
    )
  return optax.warmup_cosine_decay_schedule(
    init_value=config.warmup_lr,
    peak_value=config.lr,
    warmup_steps=config.warmup_steps,
    decay_steps=num_steps,
    end_value=config.min_lr,
  )


def make(
  config: Any, num_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Makes AdamW as the original runs it, and the schedule it follows.

  Weight decay is decoupled (lr * weight_decay * p, like `torch.optim.AdamW`)
  and touches every parameter: biases, LayerNorms, embeddings and `temp`. The
  original's ViT lists exclusions, but nothing reads the list.

  `config.clip` bounds the global norm of the gradient; 0, as in the paper, does
  not. Either way the state has the same structure, so that a run can be resumed
  with clipping turned on.

  `config.moment_dtype` is that of the first moment, the mean of gradients. The
  second one stays in float32: with a beta of 0.999 it changes by a thousandth
  a step, which bfloat16, with its eight bits, would round away.

  Raises:
    ValueError: there is no such schedule or dtype.
  """
  if config.moment_dtype not in MOMENT_DTYPES:
    raise ValueError(
      f"config.optim.moment_dtype must be one of {MOMENT_DTYPES}, found "
      f"{config.moment_dtype!r}"
    )
  rate = schedule(config, num_steps)
  b1, b2 = config.betas
  clip = (
    optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
  )
  adamw = optax.adamw(
    rate,
    b1=b1,
    b2=b2,
    eps=1e-8,
    weight_decay=config.weight_decay,
    mu_dtype=config.moment_dtype,
  )
  return optax.chain(clip, adamw), rate
