"""Every parameter has its place, and constraints are not silently dropped."""

import dataclasses
import itertools
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from blip_jax.models import families
from blip_jax.runtime import sharding, train_state
from tests import helpers

# Deep enough for layers that merge two images.
DEEP = dataclasses.replace(
  helpers.BLIP, med=dataclasses.replace(helpers.MED, depth=7)
)
D, M, V, C = 16, 32, 24, 8


def shapes(**leaves):
  return {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in leaves.items()}


def dense(rows, columns):
  return shapes(kernel=(rows, columns), bias=(columns,))


def norm():
  return shapes(scale=(D,), bias=(D,))


def attention(**more):
  names = ("query", "key", "value", "out")
  return {**{name: dense(D, D) for name in names}, **more}


def stacked(layer):
  """The arrays of three equal layers."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct((3, *leaf.shape), leaf.dtype), layer
  )


def text_tower():
  return {
    **shapes(word_embeddings=(V, D), position_embeddings=(9, D)),
    "ln_embed": norm(),
    "layers": stacked(
      {
        "attention": attention(ln=norm()),
        "crossattention": attention(ln=norm()),
        "fc_in": dense(D, M),
        "fc_out": dense(M, D),
        "ln": norm(),
      }
    ),
    "lm_head": {"transform": dense(D, D), "ln": norm(), **shapes(bias=(V,))},
  }


def blip_shapes():
  """All parameter names of a pre-training BLIP of three layers per tower."""
  return {
    "visual_encoder": {
      "patch_embed": shapes(kernel=(4, 4, 3, D), bias=(D,)),
      **shapes(cls_token=(1, 1, D), pos_embed=(1, 5, D)),
      "blocks": stacked(
        {
          "ln_1": norm(),
          "attention": attention(),
          "ln_2": norm(),
          "fc_in": dense(D, M),
          "fc_out": dense(M, D),
        }
      ),
      "ln_post": norm(),
    },
    "text_encoder": text_tower(),
    "text_decoder": text_tower(),
    "vision_proj": dense(D, C),
    "text_proj": dense(D, C),
    "itm_head": dense(D, 2),
    **shapes(temp=()),
  }


@flax.struct.dataclass
class Momentum:
  params_m: dict
  image_queue: jax.Array
  text_queue: jax.Array
  queue_ptr: jax.Array


def init_fn(params=None):
  """Weights under BLIP's names, and momentum encoders with queues."""
  if params is None:
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), blip_shapes())
    # One leaf is enough to see that a mesh does not change what is drawn.
    key = jax.random.key(0)
    params["itm_head"]["kernel"] = jax.random.normal(key, (D, 2))
  return params, Momentum(
    params_m=params,
    image_queue=jnp.ones((10, C)),
    text_queue=jnp.ones((10, C)),
    queue_ptr=jnp.zeros((), jnp.int32),
  )


def mesh_of(data, fsdp, tensor):
  sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
  return sharding.make_mesh(sizes, jax.devices()[: data * fsdp * tensor])


def specs(tree, mesh):
  return {
    sharding.path_str(path): leaf.spec
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      sharding.state_shardings(tree, mesh)
    )
  }


@pytest.mark.parametrize(
  ("asked", "shape"),
  [
    ((8, 1, 1), (8, 1, 1)),
    ((-1, 2, 1), (4, 2, 1)),
    ((2, 2, -1), (2, 2, 2)),
    ((1, -1, 1), (1, 8, 1)),
  ],
)
def test_mesh_takes_the_rest_for_minus_one(asked, shape):
  mesh = sharding.make_mesh(dict(zip(sharding.AXES, asked, strict=True)))
  assert tuple(mesh.shape.values()) == shape
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
  "asked", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 8), (16, 1, 1)]
)
def test_impossible_mesh_names_keys_devices_and_neighbours(asked):
  with pytest.raises(ValueError) as error:
    sharding.make_mesh(dict(zip(sharding.AXES, asked, strict=True)))
  message = str(error.value)
  assert "config.mesh.data * config.mesh.fsdp" in message
  assert "number of devices, 8" in message
  assert f"found data={asked[0]}, fsdp={asked[1]}" in message
  assert message.split("Nearest that fit: ")[1].count("data=") == 3


@pytest.mark.parametrize(
  "make, shape",
  [
    (lambda: None, (1, 1, 1)),
    (lambda: 4, (4, 1, 1)),
    (lambda: jax.make_mesh((8,), ("data",)), (8, 1, 1)),
    (lambda: jax.make_mesh((8,), ("x",)), (8, 1, 1)),
    (lambda: jax.make_mesh((4, 2), ("data", "tensor")), (4, 1, 2)),
    (lambda: jax.make_mesh((4, 2), ("tensor", "data")), (2, 1, 4)),
    (lambda: jax.make_mesh((2, 2, 2), ("fsdp", "data", "tensor")), (2, 2, 2)),
    (lambda: jax.sharding.Mesh(jax.devices()[:2], ("fsdp",)), (2, 1, 1)),
    (lambda: jax.sharding.Mesh(np.array(jax.devices()), "i"), (8, 1, 1)),
    (lambda: mesh_of(2, 2, 2), (2, 2, 2)),
  ],
)
def test_usual_forms_of_a_mesh_are_accepted(make, shape):
  asked = make()
  mesh = sharding.as_mesh(asked)
  assert (mesh.axis_names, mesh.devices.shape) == (sharding.AXES, shape)
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
  if isinstance(asked, jax.sharding.Mesh):
    assert {*mesh.devices.flat} == {*asked.devices.flat}
  if asked is not None and not isinstance(asked, int):
    axis = asked.axis_names[0]
    if axis in sharding.AXES and len(asked.axis_names) > 1:
      first = mesh.devices.take(0, sharding.AXES.index(axis)).flat
      assert {*first} == {*asked.devices[0].flat}


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: 9, "from 1 to 8, found 9"),
    (lambda: 0, "from 1 to 8, found 0"),
    (lambda: True, "found a bool"),
    (lambda: "data", "such as jax.make_mesh"),
    (lambda: [jax.devices()[0]], "found a list"),
    (lambda: jax.make_mesh((4, 2), ("data", "model")), "'model'"),
  ],
)
def test_other_forms_of_a_mesh_say_what_is_needed(make, message):
  with pytest.raises(ValueError, match=message) as error:
    sharding.as_mesh(make())
  assert str(error.value).startswith("mesh: expected ")


def test_nearest_mesh_comes_first():
  with pytest.raises(ValueError, match=r"fit: data=4, fsdp=2, tensor=1"):
    sharding.make_mesh({"data": 5, "fsdp": 2, "tensor": 1})


def test_every_parameter_matches_one_line_and_every_line_is_used():
  params, momentum = jax.eval_shape(init_fn)
  opt_state = jax.eval_shape(optax.adamw(1e-3).init, params)
  state = train_state.TrainState(
    step=jax.ShapeDtypeStruct((), jnp.int32),
    params=params,
    opt_state=opt_state,
    momentum=momentum,
  )
  paths = {
    **specs(state, mesh_of(2, 2, 2)),
    # What no pre-training has.
    **specs(families.abstract("nlvr", DEEP), mesh_of(2, 2, 2)),
    **specs({"idx_queue": jnp.zeros(8, int)}, mesh_of(2, 2, 2)),
  }
  for pattern, _ in sharding.PARAM_AXES:
    line = re.compile(rf"(.*/)?({pattern})")
    assert any(line.fullmatch(path) for path in paths), pattern


def test_moments_and_momentum_encoders_are_split_like_parameters():
  params, momentum = jax.eval_shape(init_fn)
  opt_state = jax.eval_shape(optax.adamw(1e-3).init, params)
  mesh = mesh_of(2, 2, 2)
  of_params = specs(params, mesh)
  of_momentum = specs(momentum, mesh)
  of_opt_state = specs(opt_state, mesh)
  for path, spec in of_params.items():
    assert of_momentum[f"params_m/{path}"] == spec
    assert of_opt_state[f"0/mu/{path}"] == spec
    assert of_opt_state[f"0/nu/{path}"] == spec
  query = "visual_encoder/blocks/attention/query/kernel"
  assert of_params[query] == P(None, "fsdp", "tensor")
  assert of_params["text_encoder/word_embeddings"] == P("tensor", "fsdp")
  assert of_momentum["image_queue"] == P()
  assert of_momentum["queue_ptr"] == P()
  assert of_opt_state["0/count"] == P()


def test_unlisted_parameter_is_refused():
  tree = {"visual_encoder": {"gate": jnp.zeros((3, 4))}}
  with pytest.raises(ValueError, match=r"visual_encoder/gate \(3, 4\).*none"):
    sharding.state_shardings(tree, mesh_of(1, 1, 1))


def test_parameter_in_two_lines_is_refused(monkeypatch):
  rules = (*sharding.PARAM_AXES, (r"lm_head/bias", (None,)))
  monkeypatch.setattr(sharding, "PARAM_AXES", rules)
  with pytest.raises(ValueError, match="exactly one line"):
    sharding.state_shardings(blip_shapes(), mesh_of(1, 1, 1))


def test_wrong_number_of_dims_is_refused():
  tree = {"query": {"kernel": jnp.zeros((2, 3, 4))}}
  with pytest.raises(ValueError, match="has shape"):
    sharding.state_shardings(tree, mesh_of(1, 1, 1))


def test_mesh_axis_used_twice_is_refused(monkeypatch):
  rules = tuple(
    (k, "fsdp" if k == "mlp" else v) for k, v in sharding.AXIS_RULES
  )
  monkeypatch.setattr(sharding, "AXIS_RULES", rules)
  with pytest.raises(ValueError, match="mesh axis twice"):
    sharding.state_shardings(blip_shapes(), mesh_of(1, 2, 1))


def test_dim_that_does_not_divide_is_replicated_and_said_why():
  tree = {"text_encoder": shapes(word_embeddings=(30524, D))}
  mesh = mesh_of(1, 1, 8)
  assert specs(tree, mesh) == {"text_encoder/word_embeddings": P()}
  text = sharding.describe(tree, mesh)
  assert "vocab of 30524 is not a multiple of tensor=8" in text
  # 30,524 rows of 16 float32, on each device because fsdp is 1.
  assert "1.9 MiB in total, 1.9 MiB per device" in text


def test_heads_that_do_not_divide_are_refused():
  tree = {"query": shapes(kernel=(D, 12))}
  with pytest.raises(ValueError, match=r"heads of 12.*config\.mesh\.tensor"):
    sharding.state_shardings(tree, mesh_of(1, 1, 8))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_state_is_created_sharded_and_equal_on_every_mesh(sizes):
  tx = optax.adamw(1e-3)
  mesh = mesh_of(*sizes)
  state = train_state.create(init_fn, tx, mesh)
  one = train_state.create(init_fn, tx, mesh_of(1, 1, 1))
  jax.tree.map(np.testing.assert_array_equal, state, one)
  abstract = train_state.abstract(init_fn, tx, mesh)
  assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(
    lambda x: x.sharding, abstract
  )
  kernel = state.momentum.params_m["text_encoder"]["layers"]["fc_in"]["kernel"]
  shard_size = kernel.size // (sizes[1] * sizes[2])
  assert {s.data.size for s in kernel.addressable_shards} == {shard_size}


def test_created_state_can_be_donated():
  # Parameters that pass through the initialiser must not share their buffer
  # with the momentum encoder that was copied from them: donating one would free
  # both.
  tx = optax.adamw(1e-3)
  mesh = mesh_of(2, 2, 2)
  given = train_state.create(init_fn, tx, mesh).params
  state = train_state.create(init_fn, tx, mesh, given)
  step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  after = step(state)
  np.testing.assert_array_equal(
    after.params["temp"], after.momentum.params_m["temp"]
  )
  assert int(after.step) == 1


def test_constraints_reach_the_compiler_only_when_active():
  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.with_logical_constraint(x * 2, ("batch", "seq", None))

  mesh = mesh_of(4, 2, 1)
  x = jnp.ones((8, 3, 5))

  def jaxpr():
    # A new function each time: a cached trace would hide the difference.
    return str(jax.make_jaxpr(lambda x: Layer().apply({}, x))(x))

  assert "sharding_constraint" not in jaxpr()
  with sharding.activate(mesh):
    text = jaxpr()
    lowered = jax.jit(lambda x: Layer().apply({}, x)).lower(x).as_text()
    out = jax.jit(lambda x: Layer().apply({}, x))(x)
  assert "sharding_constraint" in text
  assert "('data', 'fsdp')" in text
  assert '{"data", "fsdp"}' in lowered
  assert out.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 3)


def test_batch_is_split_over_data_and_fsdp():
  mesh = mesh_of(2, 2, 2)
  rows = {"image": np.arange(96, dtype=np.uint8).reshape(8, 2, 2, 3)}
  batch = sharding.put_batch(rows, mesh)
  assert sharding.num_data_shards(mesh) == 4
  assert batch["image"].sharding.spec == P(("data", "fsdp"))
  assert {s.data.shape for s in batch["image"].addressable_shards} == {
    (2, 2, 2, 3)
  }
  np.testing.assert_array_equal(batch["image"], rows["image"])


def test_batch_that_does_not_split_is_refused():
  with pytest.raises(ValueError, match=r"config\.batch_size a multiple of 8"):
    sharding.put_batch({"valid": np.ones(12, bool)}, mesh_of(8, 1, 1))


@pytest.mark.parametrize(
  "size, padded", [(0, 0), (1, 4), (4, 4), (5, 8), (8, 8), (9, 12)]
)
def test_batches_are_padded_to_the_shards(size, padded):
  assert sharding.padded_batch_size(size, mesh_of(2, 2, 2)) == padded


@pytest.mark.parametrize(
  "asked, first",
  [
    ((16, 1, 1), "data=8, fsdp=1, tensor=1"),
    ((0, 1, 8), "data=1, fsdp=1, tensor=8"),
    ((3, 3, 1), "data=2, fsdp=4, tensor=1"),
    # A -1 is free: a third of it would be nearest to 4 by the ratio.
    ((-1, 3, 1), "data=2, fsdp=4, tensor=1; data=4, fsdp=2, tensor=1"),
    ((-1, 7, 1), "data=1, fsdp=8, tensor=1; data=2, fsdp=4, tensor=1"),
  ],
)
def test_the_nearest_mesh_is_that_of_the_smallest_ratios(asked, first):
  with pytest.raises(ValueError) as error:
    sharding.make_mesh(dict(zip(sharding.AXES, asked, strict=True)))
  assert str(error.value).split("Nearest that fit: ")[1].startswith(first)


def test_bytes_of_a_state_are_those_of_all_its_arrays():
  tree = {
    "text_encoder": shapes(word_embeddings=(1024, 512)),
    "lm_head": shapes(bias=(1024,)),
  }
  tree["temp"] = jax.ShapeDtypeStruct((), jnp.float32)
  text = sharding.describe(tree, mesh_of(1, 4, 2))
  # 2 MiB over eight devices, and biases over two of the tensor axis.
  assert text.startswith(
    "2.0 MiB in total, 0.3 MiB per device on data=1, fsdp=4"
  )


@dataclasses.dataclass(frozen=True)
class Tpu:
  """What JAX says of a TPU that is in a torus."""

  id: int
  coords: tuple[int, int, int]
  process_index: int = 0
  core_on_chip: int = 0
  platform: str = "tpu"
  device_kind: str = "TPU v5"


def test_an_axis_may_be_a_part_of_a_side_of_a_torus():
  corners = itertools.product(range(4), repeat=3)
  devices = [Tpu(i, coords) for i, coords in enumerate(corners)]
  sizes = {"data": -1, "fsdp": 8, "tensor": 1}
  mesh = sharding.make_mesh(sizes, devices)
  assert dict(mesh.shape) == {"data": 8, "fsdp": 8, "tensor": 1}
  assert set(mesh.devices.flat) == set(devices)
