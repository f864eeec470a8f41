"""What compiled programs move."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from blip_jax.plan import operations, roofline, traffic

PROGRAM = """
HloModule jit_step, is_scheduled=true

%fused (p.0: f32[12,64,64], p.1: s32[]) -> f32[1,64,64] {
  %p.0 = f32[12,64,64]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,64,64]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), \
dynamic_slice_sizes={1,64,64}
}

%body (state: (s32[], f32[12,64,64])) -> (s32[], f32[12,64,64]) {
  %state = (s32[], f32[12,64,64]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %w = f32[12,64,64]{2,1,0} get-tuple-element(%state), index=1
  %layer = f32[1,64,64]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%fused
  %flat = f32[64,64]{1,0} bitcast(%layer)
  %dot = f32[64,64]{1,0} dot(%flat, %flat), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}
  %sum = f32[64,64]{1,0} all-reduce(%dot), channel_id=1, \
replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %next = (s32[], f32[12,64,64]{2,1,0}) tuple(%i, %w)
}

%condition (state: (s32[], f32[12,64,64])) -> pred[] {
  %state = (s32[], f32[12,64,64]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %limit = s32[] constant(12)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (w: f32[12,64,64], x: bf16[8,16]) -> bf16[32,16] {
  %w = f32[12,64,64]{2,1,0} parameter(0)
  %x = bf16[8,16]{1,0} parameter(1)
  %begin = s32[] constant(0)
  %start = (s32[], f32[12,64,64]{2,1,0}) tuple(%begin, %w)
  %loop = (s32[], f32[12,64,64]{2,1,0}) while(%start), condition=%condition, \
body=%body
  ROOT %all = bf16[32,16]{1,0} all-gather(%x), channel_id=2, \
replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
}
"""


def test_a_loop_counts_as_often_as_it_runs():
  counts = traffic.count(PROGRAM, "cpu")
  layer = 64 * 64 * 4
  assert set(counts.collectives) == {
    traffic.Collective("all-reduce", layer, (0, 1, 2, 3), 12),
    traffic.Collective("all-gather", 32 * 16 * 2, (0, 2, 4, 6), 1),
  }
  assert counts.matrix_bytes == 12 * 3 * layer
  # A fusion that slices reads its slice, not all layers; and an index.
  assert counts.other_bytes == 12 * (2 * layer + 4)
  assert counts.unknown_loops == 0


def test_a_loop_of_unknown_length_is_said_and_counted_as_told():
  text = PROGRAM.replace("compare(%i, %limit)", "compare(%i, %i)")
  text = text.replace("%limit = s32[] constant(12)\n", "\n")
  counts = traffic.count(text, "cpu", loop_length=5)
  assert counts.unknown_loops == 1
  assert {each.times for each in counts.collectives} == {1, 5}


@pytest.mark.parametrize(
  "shape, opcode, expected",
  [
    ("(bf16[8,16]{1,0}, bf16[32,16]{1,0})", "all-gather-start", 1024),
    ("(f32[32]{0}, f32[8]{0})", "reduce-scatter-start", 128),
    ("f32[8]{0}", "reduce-scatter", 128),
    ("(f32[8]{0}, f32[4]{0})", "all-reduce-start", 48),
    ("(f32[8]{0}, f32[8]{0})", "collective-permute-start", 32),
  ],
)
def test_bytes_of_collectives(shape, opcode, expected):
  text = f"""
ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %y = {shape} {opcode}(%x), replica_groups={{{{0,1,2,3}}}}
}}
"""
  (found,) = traffic.count(text, "gpu").collectives
  assert found.nbytes == expected


def test_what_is_next_to_the_units_of_a_tpu_is_not_memory():
  text = """
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0)
  ROOT %y = f32[8]{0:T(128)S(1)} negate(%x)
}
"""
  assert traffic.count(text, "tpu").other_bytes == 32
  assert traffic.count(text, "gpu").other_bytes == 64


def test_counts_of_a_compiled_program_are_those_of_its_layers():
  """Weights that are split over devices are gathered once for each layer."""
  mesh = jax.make_mesh((8,), ("fsdp",))
  depth, side = 6, 64
  place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))

  def apply(weights, x):
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    return jax.lax.scan(layer, x, weights)[0]

  weights = jax.ShapeDtypeStruct(
    (depth, side, side), jnp.float32, sharding=place(None, "fsdp")
  )
  x = jax.ShapeDtypeStruct((128, side), jnp.float32, sharding=place("fsdp"))
  traced = jax.jit(apply, out_shardings=place("fsdp")).trace(weights, x)
  assert operations.flops(traced.jaxpr.jaxpr) == 2 * depth * 128 * side**2
  counts = traffic.count(traced.lower().compile().as_text() or "", "cpu")
  gathered = roofline.by_kind(counts.collectives)["all-gather"]
  assert gathered[1] == depth * side * side * 4
  assert counts.unknown_loops == 0


def test_groups_of_a_compiled_program_are_those_of_its_mesh():
  """Weights are gathered within `fsdp`; gradients are summed over both axes."""
  mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
  place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))

  def step(weights, x):
    def loss(weights):
      layer = lambda x, w: (jnp.tanh(x @ w), None)
      return jax.lax.scan(layer, x, weights)[0].sum()

    return jax.grad(loss)(weights)

  weights = jax.ShapeDtypeStruct(
    (6, 64, 64), jnp.float32, sharding=place(None, "fsdp")
  )
  x = jax.ShapeDtypeStruct(
    (128, 64), jnp.float32, sharding=place(("data", "fsdp"))
  )
  compiled = (
    jax.jit(step, out_shardings=place(None, "fsdp")).lower(weights, x).compile()
  )
  counts = traffic.count(compiled.as_text() or "", "cpu")
  found = {(each.kind, each.group) for each in counts.collectives}
  row, column = (0, 1, 2, 3), (0, 4)
  assert ("all-gather", row) in found
  # The compiler may sum along the axes one after another.
  assert {group for _, group in found} <= {row, column, (*range(8),)}
