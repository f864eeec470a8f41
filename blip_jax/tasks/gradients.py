"""Loss and gradients of a batch: at once, or accumulated over micro-batches.

Dimensions: B batch, n micro-batches of b examples (B = n * b).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import spmd
from jaxtyping import Array, Int, PRNGKeyArray, Shaped

from blip_jax.tasks import base


def of_batch(
  task: base.Task,
  params: base.Params,
  momentum: Any,
  batch: base.Batch,
  *,
  rng: PRNGKeyArray,
  step: Int[Array, ""],
  accum_steps: int = 1,
) -> tuple[base.Params, tuple[Any, base.Metrics]]:
  """Gradients of the loss of a batch.

  Accumulated gradients are those of the whole batch, up to rounding; only
  dropout draws other masks.

  Args:
    task: a `base.SummedTask`, if gradients are accumulated.
    params: after `task.clamp`.
    momentum: the momentum state, if the task has one.
    batch: its arrays have B rows.
    rng: for dropout and sampling.
    step: number of steps done.
    accum_steps: number of micro-batches.

  Returns:
    The gradients, the next momentum state, and metrics by name.
  """
  if accum_steps == 1:
    gradients = jax.grad(task.loss, has_aux=True)
    return gradients(params, momentum, batch, rng=rng, step=step)
  assert isinstance(task, base.SummedTask), task
  num_terms = task.num_terms(batch)

  def of_part(index, part):
    return jax.grad(task.loss, has_aux=True)(
      params,
      momentum,
      part,
      rng=jax.random.fold_in(rng, index),
      step=step,
      num_terms=num_terms,
    )

  def add(sums, numbered):
    grads, (_, metrics) = of_part(*numbered)
    return jax.tree.map(jnp.add, sums, (grads, metrics)), None

  parts = {name: _micro_batches(x, accum_steps) for name, x in batch.items()}
  numbered = jnp.arange(accum_steps), parts
  first = jax.tree.map(lambda x: x[0], numbered)
  grads, (_, metrics) = jax.eval_shape(of_part, *first)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, metrics))
  (grads, metrics), _ = jax.lax.scan(add, zeros, numbered)
  return grads, (momentum, metrics)


def _micro_batches(
  x: Shaped[Array, "B ..."], n: int
) -> Shaped[Array, "n b ..."]:
  """Splits a batch: micro-batch k has every n-th row, from row k on.

  So every device keeps its rows, and the split does not depend on the mesh.
  """
  parts = jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1)
  unsplit = (None,) * (x.ndim - 1)
  return spmd.with_logical_constraint(parts, (None, "batch", *unsplit))
