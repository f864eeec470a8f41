"""Everything that a step changes, as one tree, created where it lives."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from blip_jax.runtime import sharding

# Params | None -> (params, momentum). Given parameters, it keeps them and makes
# only the momentum state that belongs to them; given None, it makes both.
InitFn = Callable[[Any], tuple[Any, Any]]


class TrainState(struct.PyTreeNode):
  """A run between two steps.

  The same class also holds shapes, or shardings, in place of the arrays.
  Randomness is `fold_in(key(seed), step)`, so there is no key to keep.
  """

  step: Any  # int32 []: how many updates were made
  params: Any
  opt_state: Any
  momentum: Any  # momentum encoders, queues and their pointer; or None


def abstract(
  init_fn: InitFn, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
  """The state that `create` would make: shapes, dtypes and shardings."""
  shapes = jax.eval_shape(lambda: _fresh(init_fn, tx, None))
  return sharding.abstract_state(shapes, mesh)


def create(
  init_fn: InitFn,
  tx: optax.GradientTransformation,
  mesh: Mesh,
  params: Any = None,
) -> TrainState:
  """Makes the state of step 0, sharded from the first byte.

  The initialiser is compiled with the shardings as its outputs, so that no
  device ever holds a full copy of a model that only fits when split. Call it
  outside `sharding.activate`: constraints on activations would require the
  initialiser's batch to split over the mesh.

  Args:
    init_fn: see `InitFn`.
    tx: the optimiser, whose state is made for the parameters.
    mesh: from `sharding.make_mesh`.
    params: sharded parameters to start from; fresh ones when None.
  """
  shardings = jax.tree.map(lambda s: s.sharding, abstract(init_fn, tx, mesh))
  fresh = jax.jit(
    lambda params: _fresh(init_fn, tx, params), out_shardings=shardings
  )
  return fresh(params)


def _fresh(init_fn, tx, params) -> TrainState:
  params, momentum = init_fn(params)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=tx.init(params),
    momentum=momentum,
  )
