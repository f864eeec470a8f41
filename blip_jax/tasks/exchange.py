"""Examples of a batch that other devices need."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int, Shaped

from blip_jax.runtime import sharding
from blip_jax.tasks import losses


def take(
  rows: Shaped[Array, "B ..."], index: Int[Array, "G b"]
) -> Shaped[Array, "B ..."]:
  """Selects rows by their index within each of G groups of the batch.

  Where a mesh is active, the devices of a group gather its rows, and gradients
  are reduced and scattered to the devices that own the rows. Left to itself,
  the compiler for TPUs may sum whole batches over all devices for both, which
  moves twice the bytes.

  Args:
    rows: split over the batch axes of the mesh.
    index: of the row that each one is replaced with.
  """
  axes = dict(sharding.AXIS_RULES)["batch"]
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return losses.take_in_group(rows, index)
  groups, size = index.shape
  shards = sharding.num_data_shards(mesh)
  members = None  # all
  if groups > 1 and shards % groups == 0:
    members = [
      [*range(first, first + shards // groups)]
      for first in range(0, shards, shards // groups)
    ]
  else:  # of the entire batch
    index = index + size * jnp.arange(groups)[:, None]

  def exchange(mine, index):
    return jax.lax.all_gather(
      mine, axes, axis_index_groups=members, tiled=True
    )[index]

  split = PartitionSpec(axes)
  return jax.shard_map(exchange, in_specs=(split, split), out_specs=split)(
    rows, index.reshape(-1)
  )
