"""Where every array lives: parameter path -> logical axes -> mesh axes.

Models never name a mesh axis. A weight's path says which logical axes it has
(PARAM_AXES), and one short table says which mesh axis carries each of them
(AXIS_RULES). To split a model differently, edit AXIS_RULES; to add a parameter,
add a line to PARAM_AXES. The paths of Adam's moments and of the momentum
encoders end like those of the parameters, so they are split the same way.

The mesh has three axes:
  data    copies of the weights, each with its own examples of the batch
  fsdp    also splits the batch, and the weights, which are gathered when used
  tensor  splits heads, MLP units and the vocabulary inside one example
"""

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from blip_jax.runtime import devices as devices_lib

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis or axes. `embed` shards weights only: activations
# leave their width unnamed, because `fsdp` already splits their rows.
AXIS_RULES = (
  ("batch", ("data", "fsdp")),
  ("seq", None),
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("mlp", "tensor"),
  ("vocab", "tensor"),
)

# Arrays of all layers of a stack have an axis more, the first.
_STACK = re.compile(r"(^|/)(blocks|layers|merging_layers)/")

# End of the path -> logical axes, one name or None per dimension. A path must
# match exactly one line. Vectors of width D are replicated: gathering them
# would cost more than the few kilobytes it saves. So are the queues, with which
# every example is compared in every step.
#   D width, P patch, N image tokens, L text positions, V vocabulary, M MLP,
#   H*K heads times head size, C joint embedding, Q queue
PARAM_AXES = (
  (r"patch_embed/kernel", (None, None, None, "embed")),  # P P 3 D
  (r"cls_token|pos_embed", (None, None, "embed")),  # 1 N D
  (r"word_embeddings", ("vocab", "embed")),  # V D
  (r"position_embeddings", (None, "embed")),  # L D
  (r"(query|key|value)/kernel", ("embed", "heads")),  # D H*K
  (r"(query|key|value)/bias", ("heads",)),  # H*K
  (r"out/kernel", ("heads", "embed")),  # H*K D
  (r"fc_in/kernel", ("embed", "mlp")),  # D M
  (r"fc_in/bias", ("mlp",)),  # M
  (r"fc_out/kernel", ("mlp", "embed")),  # M D
  (r"lm_head/transform/kernel", ("embed", None)),  # D D
  (r"lm_head/bias", ("vocab",)),  # V
  (r"(vision_proj|text_proj|itm_head)/kernel", ("embed", None)),  # D C, D 2
  (r"merge/kernel", (None, "embed")),  # 2D D
  (
    r"(patch_embed|out|fc_out|transform|merge|(vision|text)_proj|itm_head)/bias",
    (None,),
  ),  # D, C or 2
  (r"(ln|ln_1|ln_2|ln_post|ln_embed)/(scale|bias)", (None,)),  # D
  (r"(image|text)_queue", (None, None)),  # Q C
  (r"idx_queue", (None,)),  # Q
  (r"temp|queue_ptr|step|count", ()),
)


def make_mesh(config: Any, devices: Sequence[Any] | None = None) -> Mesh:
  """Makes the mesh of `config.data`, `.fsdp` and `.tensor`.

  At most one of the three may be -1 and then takes the devices that are left.
  The log says which devices these are.

  Raises:
    ValueError: the three do not multiply to the number of devices, or a group
      of `tensor` devices would span processes (each reads its own examples).
  """
  devices = devices_lib.found() if devices is None else list(devices)
  sizes = [int(config[axis]) for axis in AXES]
  known = math.prod(size for size in sizes if size != -1)
  if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if min(sizes) < 1 or math.prod(sizes) != len(devices):
    raise ValueError(
      "config.mesh.data * config.mesh.fsdp * config.mesh.tensor must be the "
      f"number of devices, {len(devices)} (one of them may be -1, the rest); "
      f"found {_mesh_text([int(config[axis]) for axis in AXES])}. "
      f"Nearest that fit: {'; '.join(_nearest(sizes, len(devices)))}"
    )
  # An axis of the mesh may be a part of a side of a TPU's torus.
  grid = mesh_utils.create_device_mesh(
    tuple(sizes), devices, allow_split_physical_axes=True
  )
  # Linen modules need Auto.
  mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)
  _check_tensor(mesh)
  devices_lib.report(devices)
  return mesh


def _check_tensor(mesh: Mesh) -> None:
  for group in mesh.devices.reshape(-1, mesh.shape["tensor"]):
    if len({device.process_index for device in group}) > 1:
      raise ValueError(
        f"config.mesh.tensor={mesh.shape['tensor']} would split one example "
        f"over several processes; use at most the number of devices of "
        f"one process, {jax.local_device_count()}"
      )


def one_device() -> Mesh:
  """A mesh of a single device."""
  return make_mesh(dict.fromkeys(AXES, 1), devices_lib.found()[:1])


def as_mesh(devices: Any) -> Mesh:
  """Makes the mesh that a user asks for.

  Args:
    devices: None for one device; a number of devices, each of which gets its
      own examples; or a `jax.sharding.Mesh` whose axes are some of AXES, in any
      order. A mesh of one axis may call it anything: it splits the batch.

  Raises:
    ValueError: it is none of these, or there are not as many devices.
  """
  if devices is None:
    return one_device()
  if isinstance(devices, int) and not isinstance(devices, bool):
    found = devices_lib.found()
    if not 1 <= devices <= len(found):
      raise ValueError(
        f"mesh: expected a number of devices from 1 to {len(found)}, found "
        f"{devices}"
      )
    sizes = {"data": devices, "fsdp": 1, "tensor": 1}
    return make_mesh(sizes, found[:devices])
  if not isinstance(devices, Mesh):
    raise ValueError(
      f"mesh: {_MESH_FORMS}; found a {type(devices).__name__}, {devices!r:.80}"
    )
  names = devices.axis_names if len(devices.axis_names) > 1 else AXES[:1]
  if not set(names) <= set(AXES):
    raise ValueError(f"mesh: {_MESH_FORMS}; found the axes {names}")
  # In the order of AXES, with axes of size one for those that are missing, and
  # of the type that Linen modules need.
  order = [names.index(axis) for axis in AXES if axis in names]
  sizes: dict[str, int] = dict(zip(names, devices.devices.shape, strict=True))
  mesh = Mesh(
    devices.devices.transpose(order).reshape([sizes.get(a, 1) for a in AXES]),
    AXES,
    axis_types=(AxisType.Auto,) * 3,
  )
  _check_tensor(mesh)
  return mesh


_MESH_FORMS = (
  "expected None, a number of devices, or a jax.sharding.Mesh with axes among "
  f"{AXES}, such as jax.make_mesh((4, 2), ('data', 'tensor'))"
)


def _mesh_text(sizes: Sequence[int]) -> str:
  return ", ".join(f"{a}={s}" for a, s in zip(AXES, sizes, strict=True))


def _nearest(sizes: Sequence[int], num_devices: int) -> list[str]:
  """The three meshes of all devices that differ least from `sizes`."""
  divisors = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
  fitting = [
    shape
    for shape in itertools.product(divisors, repeat=3)
    if math.prod(shape) == num_devices
  ]

  def distance(shape):
    # In octaves, so that 3 is as near to 2 as 30 is to 20. A -1 is free.
    return sum(
      abs(math.log(new / max(old, 1)))
      for new, old in zip(shape, sizes, strict=True)
      if old != -1
    )

  return [_mesh_text(shape) for shape in sorted(fitting, key=distance)[:3]]


def num_data_shards(mesh: Mesh | AbstractMesh) -> int:
  """The number of pieces that the batch is split into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def num_processes(mesh: Mesh) -> int:
  """The number of processes that own the devices of the mesh."""
  return len({device.process_index for device in mesh.devices.flat})


def padded_batch_size(size: int, mesh: Mesh) -> int:
  """The size, rounded up to one that splits evenly over the mesh."""
  shards = num_data_shards(mesh)
  return -(-size // shards) * shards


def replicated(mesh: Mesh) -> NamedSharding:
  """A full copy of the array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The first dimension over the batch axes, the others unsplit."""
  return NamedSharding(mesh, PartitionSpec(dict(AXIS_RULES)["batch"]))


@contextlib.contextmanager
def activate(mesh: Mesh) -> Iterator[None]:
  """Gives `nn.with_logical_constraint` its mesh and its rules.

  Call every jitted function inside it, at least the first time, when it is
  traced. Neither half works alone, and both fail silently: under `with mesh:`
  Flax drops the constraint, and the compiler may then gather all activations on
  each device.
  """
  with jax.set_mesh(mesh), nn.logical_axis_rules(AXIS_RULES):
    yield


def put_batch(
  arrays: Mapping[str, np.ndarray], mesh: Mesh
) -> dict[str, jax.Array]:
  """Makes global arrays, split over the batch axes.

  Args:
    arrays: the local rows of this process, `[B / processes, ...]` each.
    mesh: from `make_mesh`.

  Raises:
    ValueError: the global batch does not split evenly over the mesh.
  """
  sharding, shards = batch_sharding(mesh), num_data_shards(mesh)
  batch = {}
  for name, rows in arrays.items():
    shape = (rows.shape[0] * num_processes(mesh), *rows.shape[1:])
    if shape[0] % shards:
      raise ValueError(
        f"a batch of {shape[0]} rows ({name}) does not split over "
        f"{shards} shards (data * fsdp of {dict(mesh.shape)}); make "
        f"config.batch_size a multiple of {shards}"
      )
    batch[name] = jax.make_array_from_process_local_data(sharding, rows, shape)
  return batch


def local_rows(array: jax.Array) -> np.ndarray:
  """The local rows of an output that is split like a batch."""
  shards = {s.index[0].start or 0: s.data for s in array.addressable_shards}
  return np.concatenate([shards[start] for start in sorted(shards)])


def rows_later(outputs: Any) -> Callable[[], Any]:
  """Starts to copy outputs that are split like a batch to the host.

  Returns:
    A function that waits for them and returns their local rows.
  """
  for array in jax.tree.leaves(outputs):
    array.copy_to_host_async()
  return lambda: jax.tree.map(local_rows, outputs)


def path_str(path: tuple[Any, ...]) -> str:
  """Renders a pytree path as `visual_encoder/blocks/ln_1/scale`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def logical_axes(path: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
  """Looks a path up in PARAM_AXES.

  Raises:
    ValueError: no line, or more than one, matches the path; or the line
      describes another number of dimensions.
  """
  found = [
    (pattern, axes)
    for pattern, axes in PARAM_AXES
    if re.fullmatch(rf"(?:.*/)?(?:{pattern})", path)
  ]
  if len(found) != 1:
    lines = ", ".join(pattern for pattern, _ in found) or "none"
    raise ValueError(
      f"{path} {shape} must match exactly one line of PARAM_AXES in "
      f"blip_jax/runtime/sharding.py; it matches {lines}"
    )
  ((pattern, axes),) = found
  if _STACK.search(path):
    axes = (None, *axes)  # The layers, which are used one after another.
  if len(axes) != len(shape):
    raise ValueError(
      f"{path} has shape {shape}, but PARAM_AXES gives {pattern} the "
      f"{len(axes)} axes {axes}"
    )
  return axes


def partition_spec(
  path: str, shape: tuple[int, ...], mesh: Mesh
) -> tuple[PartitionSpec, list[str]]:
  """Resolves the mesh axes of one array, and lists what had to stay unsplit.

  A dim that its mesh axis does not divide is replicated: the vocabulary of
  30,524 does not split by 8, and refusing the mesh for it would be worse than
  storing it unsplit. Heads are the exception, as half a head has no meaning.

  Raises:
    ValueError: `heads` does not divide, or a mesh axis would be used twice.
  """
  rules, entries, notes = dict(AXIS_RULES), [], []
  for dim, logical in zip(shape, logical_axes(path, shape), strict=True):
    axis = rules[logical] if logical else None
    if axis and dim % mesh.shape[axis]:
      note = (
        f"{path} {shape}: {logical} of {dim} is not a multiple of "
        f"{axis}={mesh.shape[axis]}"
      )
      if logical == "heads":
        raise ValueError(f"{note}; choose another config.mesh.{axis}")
      notes.append(f"{note}, so it is replicated")
      axis = None
    entries.append(axis)
  used = [axis for axis in entries if axis]
  if len(set(used)) < len(used):
    raise ValueError(
      f"{path} {shape} would use a mesh axis twice: {entries}; two of its "
      f"logical axes share a mesh axis in AXIS_RULES"
    )
  return PartitionSpec(*entries), notes


def state_shardings(tree: Any, mesh: Mesh) -> Any:
  """Maps each leaf of any tree (arrays or shapes) to its NamedSharding."""

  def one(path, leaf):
    spec, _ = partition_spec(path_str(path), leaf.shape, mesh)
    return NamedSharding(mesh, _as_of_outputs(spec, mesh))

  return jax.tree_util.tree_map_with_path(one, tree)


def _as_of_outputs(spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
  """The shortest equal one, as JAX gives it to what a program returns.

  With another one a step would be compiled again for the state that it made.
  """
  entries = [axis if axis and mesh.shape[axis] > 1 else None for axis in spec]
  while entries and entries[-1] is None:
    entries.pop()
  return PartitionSpec(*entries)


def abstract_state(tree: Any, mesh: Mesh) -> Any:
  """The same tree as shapes, dtypes and shardings, with no data."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    tree,
    state_shardings(tree, mesh),
  )


def describe(tree: Any, mesh: Mesh) -> str:
  """Bytes in total and per device, and dimensions that stay unsplit."""
  total, local, notes = 0, 0, []
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    spec, leaf_notes = partition_spec(path_str(path), leaf.shape, mesh)
    shard = NamedSharding(mesh, spec).shard_shape(leaf.shape)
    total += math.prod(leaf.shape) * leaf.dtype.itemsize
    local += math.prod(shard) * leaf.dtype.itemsize
    notes += leaf_notes
  return "\n".join(
    [
      f"{total / 2**20:,.1f} MiB in total, {local / 2**20:,.1f} MiB per device "
      f"on {_mesh_text(list(mesh.shape.values()))}",
      *notes,
    ]
  )
