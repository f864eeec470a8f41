"""Momentum encoders: EMA of the online towers, feature queues, soft targets.

A training step follows this order, which is the original's:

  1. clamp `temp`                       (`clamp_temp`, before the gradient)
  2. online features
  3. EMA of the momentum encoders       (`ema`, before they are used)
  4. momentum features
  5. soft targets                       (`soft_targets`)
  6. ITC against [momentum features of the batch; queue]
  7. enqueue the momentum features      (`enqueue`, after ITC, so that the queue
                                         does not contain the current batch)
  8. ITM with hard negatives
  9. LM

Dimensions: B batch, Q queue, C joint embedding, K candidates.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, PRNGKeyArray

Params = dict

# The id in `idx_queue` of entries that are still random.
NO_IMAGE = -100

# The online modules that have a momentum encoder.  The text encoder's includes
# its unused cross-attention, because the released checkpoints contain it.
MOMENTUM_PARTS = ("visual_encoder", "vision_proj", "text_encoder", "text_proj")


@struct.dataclass
class Momentum:
  """The momentum state: encoders, and ring buffers of their recent features.

  The fields may also be shapes or shardings instead of arrays.

  Attributes:
    params_m: parameters of the momentum encoders, by MOMENTUM_PARTS.
    image_queue: image features, float32 [Q, C].
    text_queue: text features, float32 [Q, C].
    queue_ptr: index of the next entry to overwrite, int32 [].
    idx_queue: image ids of the entries, int32 [Q]; only in retrieval.
  """

  params_m: Params
  image_queue: Any
  text_queue: Any
  queue_ptr: Any
  idx_queue: Any = None


def init(
  params: Params, queue_size: int, embed_dim: int, rng: PRNGKeyArray
) -> Momentum:
  """Momentum encoders equal to the online ones, and queues of random unit
  vectors."""
  features = jax.random.normal(rng, (2, queue_size, embed_dim))
  features = features / jnp.linalg.norm(features, axis=-1, keepdims=True)
  return Momentum(
    params_m=jax.tree.map(jnp.copy, {k: params[k] for k in MOMENTUM_PARTS}),
    image_queue=features[0],
    text_queue=features[1],
    queue_ptr=jnp.int32(0),
  )


def clamp_temp(params: Params) -> Params:
  """Clips the learned temperature to the original's range, [0.001, 0.5]."""
  return {**params, "temp": jnp.clip(params["temp"], 0.001, 0.5)}


def ema(params: Params, momentum: Momentum, decay: float) -> Momentum:
  """Moves the momentum encoders towards the online ones:
  params_m = decay * params_m + (1 - decay) * params."""
  params = {k: params[k] for k in MOMENTUM_PARTS}
  params_m = optax.incremental_update(params, momentum.params_m, 1 - decay)
  return dataclasses.replace(momentum, params_m=params_m)


def enqueue(
  momentum: Momentum,
  image_feat_m: Float[Array, "B C"],
  text_feat_m: Float[Array, "B C"],
  image_id: Int[Array, " B"] | None = None,
) -> Momentum:
  """Overwrites the oldest entries of the queues, wrapping around.

  The batch size need not divide the queue size.  The original requires it, but
  its queue size of 57,600 is no multiple of a batch size of 4,096.

  Args:
    momentum: the state before.
    image_feat_m: momentum image features.
    text_feat_m: momentum text features.
    image_id: the images' ids, if the state has `idx_queue`.
  """
  queue_size, batch_size = len(momentum.image_queue), len(image_feat_m)
  # Of a batch larger than the queue only the end is kept.  Writing all of it
  # would write entries twice, in an order that XLA does not define.
  kept = min(batch_size, queue_size)
  start = momentum.queue_ptr + batch_size - kept
  index = (start + jnp.arange(kept)) % queue_size
  put = lambda queue, new: queue.at[index].set(new[-kept:], unique_indices=True)
  return dataclasses.replace(
    momentum,
    image_queue=put(momentum.image_queue, image_feat_m),
    text_queue=put(momentum.text_queue, text_feat_m),
    queue_ptr=(momentum.queue_ptr + batch_size) % queue_size,
    idx_queue=None if image_id is None else put(momentum.idx_queue, image_id),
  )


def soft_targets(
  sim_m: Float[Array, "*B K"],
  hard: Float[Array, "*B K"],
  alpha: Float[Array, ""],
) -> Float[Array, "*B K"]:
  """Mixes the momentum encoders' predictions into the hard targets.

  Args:
    sim_m: similarities of momentum features, divided by `temp`.
    hard: hard targets, whose rows sum to 1.
    alpha: weight of the predictions.
  """
  return alpha * jax.nn.softmax(sim_m, axis=-1) + (1 - alpha) * hard


def ramp(alpha: float, step: Int[Array, ""], ramp_steps: int):
  """Increases alpha linearly from 0 over the first `ramp_steps` steps, while
  the momentum encoders are still untrained."""
  return alpha * jnp.minimum(1.0, step / max(ramp_steps, 1))
