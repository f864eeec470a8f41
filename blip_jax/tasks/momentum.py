"""The momentum twin: EMA towers, feature queues and soft targets.

Inside a step the order is a contract (the original's, spec by its code):

  1. clamp `temp`                       (`clamp_temp`, before the gradient)
  2. online features
  3. EMA of the twin                    (`ema`, before it is used)
  4. the twin's features
  5. soft targets                       (`soft_targets`)
  6. ITC against [twin's batch; queue]
  7. enqueue the twin's features        (`enqueue`, so that the queue never
                                         holds the batch it is compared with)
  8. ITM with hard negatives
  9. LM

Dimensions: B batch, Q queue, C joint embedding, K candidates.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

Params = dict

# The id in `idx_queue` of a row that no image has filled yet.
NO_IMAGE = -100

# What the twin copies.  It keeps cross-attention although it never looks at an
# image: so do the released checkpoints.
MOMENTUM_PARTS = ("visual_encoder", "vision_proj", "text_encoder", "text_proj")


@flax.struct.dataclass
class Momentum:
  """The twin's parameters and a ring buffer of its recent features.

  The same class also holds shapes, or shardings, in place of the arrays.
  """

  params_m: Params
  image_queue: Any  # float32 [Q, C]
  text_queue: Any  # float32 [Q, C]
  queue_ptr: Any  # int32 []: the row that is written next
  idx_queue: Any = None  # int32 [Q]: of which images; retrieval has it


def init(
  params: Params, queue_size: int, embed_dim: int, rng: PRNGKeyArray
) -> Momentum:
  """A twin equal to its student, and queues of random unit vectors."""
  rows = jax.random.normal(rng, (2, queue_size, embed_dim))
  rows = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
  return Momentum(
    params_m=jax.tree.map(jnp.copy, {k: params[k] for k in MOMENTUM_PARTS}),
    image_queue=rows[0],
    text_queue=rows[1],
    queue_ptr=jnp.int32(0),
  )


def clamp_temp(params: Params) -> Params:
  """Keeps the learned temperature in the original's range."""
  return {**params, "temp": jnp.clip(params["temp"], 0.001, 0.5)}


def ema(params: Params, momentum: Momentum, decay: float) -> Momentum:
  """Moves the twin towards its student."""
  params = {k: params[k] for k in MOMENTUM_PARTS}
  params_m = optax.incremental_update(params, momentum.params_m, 1 - decay)
  return momentum.replace(params_m=params_m)


def enqueue(
  momentum: Momentum,
  image_feat_m: Float[Array, "B C"],
  text_feat_m: Float[Array, "B C"],
  image_id: Int[Array, " B"] | None = None,
) -> Momentum:
  """Overwrites the oldest rows, wrapping around.

  The original insists that the batch divides the queue, which its own 57,600
  does not grant a batch of 4,096.
  """
  queue_size, batch_size = len(momentum.image_queue), len(image_feat_m)
  # Of a batch larger than the queue only the end would survive; writing all
  # of it would leave the order of colliding writes to the compiler.
  kept = min(batch_size, queue_size)
  start = momentum.queue_ptr + batch_size - kept
  rows = (start + jnp.arange(kept)) % queue_size
  write = lambda queue, new: queue.at[rows].set(
    new[-kept:], unique_indices=True
  )
  return momentum.replace(
    image_queue=write(momentum.image_queue, image_feat_m),
    text_queue=write(momentum.text_queue, text_feat_m),
    queue_ptr=(momentum.queue_ptr + batch_size) % queue_size,
    idx_queue=(
      None if image_id is None else write(momentum.idx_queue, image_id)
    ),
  )


def soft_targets(
  sim_m: Float[Array, "B K"],
  hard: Float[Array, "B K"],
  alpha: Float[Array, ""],
) -> Float[Array, "B K"]:
  """The twin's opinion, mixed into the hard targets."""
  return alpha * jax.nn.softmax(sim_m, axis=-1) + (1 - alpha) * hard


def ramp(alpha: float, step: Int[Array, ""], ramp_steps: int):
  """Trusts the twin little by little while it is still untrained."""
  return alpha * jnp.minimum(1.0, step / max(ramp_steps, 1))
