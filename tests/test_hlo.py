"""The text of compiled programs."""

import pytest

from blip_jax.plan import hlo

PROGRAM = """
HloModule jit_f

%inner (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %negate = f32[8]{0} negate(%x)
}

%fused (a: f32[8], b: f32[8]) -> f32[8] {
  %b = f32[8]{0} parameter(1)
  %a = f32[8]{0} parameter(0)
  ROOT %add = f32[8]{0} add(%a, %b)
}

%condition (y: f32[8]) -> pred[] {
  %y = f32[8]{0} parameter(0)
  ROOT %go_on = pred[] custom-call(%y), custom_call_target="go_on"
}

%body (z: f32[8]) -> f32[8] {
  %z = f32[8]{0} parameter(0)
  %again = f32[8]{0} while(%z), condition=%condition, body=%inner, \
backend_config={"known_trip_count":{"n":"3"}}
  ROOT %sum = f32[8]{0:T(128)} fusion(%again, %z), kind=kLoop, calls=%fused
}

ENTRY %main (w: f32[8]) -> f32[8] {
  %w = f32[8]{0} parameter(0)
  %loop = f32[8]{0} while(%w), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %all = f32[8]{0} call(%loop), to_apply=%inner
}
"""


def times(module, **words):
  """How often each instruction runs in all."""
  total = {}
  for _, instruction, number in module.executed(**words):
    total[instruction.name] = total.get(instruction.name, 0) + number
  return total


def test_what_is_within_loops_runs_as_often_as_they_do():
  found = times(hlo.Module(PROGRAM))
  assert found["loop"] == 1 and found["sum"] == 5
  # The inner loop, and the call.
  assert found["negate"] == 5 * 3 + 1
  assert "add" not in found
  assert times(hlo.Module(PROGRAM), into_fusions=True)["add"] == 5


def test_loops_of_unknown_length_are_named():
  text = PROGRAM.replace('"known_trip_count":{"n":"3"}', "")
  module = hlo.Module(text, loop_length=7)
  assert times(module)["negate"] == 5 * 7 + 1
  assert module.unknown_loops == {"again"}


def test_the_larger_branch_of_a_conditional_runs():
  text = """
%idle (x: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} parameter(0)
}

%busy (y: f32[8]) -> f32[8] {
  %y = f32[8]{0} parameter(0)
  ROOT %negate = f32[8]{0} negate(%y)
}

ENTRY %main (p: pred[], w: f32[8]) -> f32[8] {
  %p = pred[] parameter(0)
  %w = f32[8]{0} parameter(1)
  ROOT %either = f32[8]{0} conditional(%p, %w, %w), BRANCHES
}
"""
  for branches in (
    "true_computation=%idle, false_computation=%busy",
    "branch_computations={%idle, %busy}",
  ):
    found = times(hlo.Module(text.replace("BRANCHES", branches)))
    assert found["negate"] == 1 and "x" not in found


def test_parts_of_an_instruction():
  module = hlo.Module(PROGRAM)
  assert module.root("body") == hlo.Instruction(
    "sum",
    "f32[8]{0:T(128)}",
    "fusion",
    ("again", "z"),
    "(%again, %z), kind=kLoop, calls=%fused",
    True,
  )
  assert module.root("body").called == ["fused"]
  assert module.parameters("fused") == {0: "a", 1: "b"}


@pytest.mark.parametrize(
  "shape, expected",
  [
    ("f32[8,16]{1,0}", 512),
    ("(bf16[3]{0}, s32[], pred[5]{0})", 6 + 4 + 5),
    ("(f32[4]{0}, token[])", 16),
    ("f8e4m3fn[10]", 10),
    ("s4[6]", 3),
    ("f32[0,7]", 0),
  ],
)
def test_bytes_of_types(shape, expected):
  assert hlo.nbytes(shape) == expected


def test_bytes_of_some_arrays_of_a_type():
  shape = "(f32[8]{0:T(128)S(1)}, f32[4]{0:T(128)})"
  assert hlo.nbytes(shape, "S(1)") == 16
  assert hlo.nbytes_of_first(shape) == 32
  assert hlo.nbytes_of_first("()") == 0
