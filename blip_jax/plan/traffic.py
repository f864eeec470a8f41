"""What a compiled program moves on one device: collectives, bytes of memory."""

import collections
import dataclasses
import functools
import re
import sys

from blip_jax.plan import groups, hlo
from blip_jax.plan.hlo import Instruction

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)

_MATRIX_CALL = re.compile(
  r'custom_call_target="[^"]*'
  r"(?i:gemm|matmul|dot|conv|attention|fmha|flash|splash)"
)

# They move nothing: they give names to what is there, or are the loops and
# calls whose bodies are counted.
_FREE = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",
  "conditional",
  "call",
  "after-all",
  "partition-id",
  "replica-id",
  "opt-barrier",
  "iota",
  "rng-get-and-update-state",
}
_SLICES = ("dynamic-slice", "gather", "slice")
# The memory of a TPU that is next to its units; elsewhere the same number
# means other things.
_ON_CHIP = "S(1)"


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective of a program.

  Attributes:
    kind: one of KINDS.
    nbytes: of the larger of its input and output on one device.
    group: numbers of the devices of its first group.
    times: it runs.
  """

  kind: str
  nbytes: int
  group: tuple[int, ...]
  times: int


@dataclasses.dataclass(frozen=True)
class Counts:
  """What a program does on one device.

  Attributes:
    collectives: all of them.
    matrix_bytes: read and written by products of matrices.
    other_bytes: read and written by everything else but collectives.
    operations: that run, one after another.
    unknown_loops: loops of unknown length; they count as `loop_length` says.
    largest_operands: bytes of both operands of the largest product.
  """

  collectives: tuple[Collective, ...]
  matrix_bytes: int
  other_bytes: int
  operations: int
  unknown_loops: int
  largest_operands: int = 0


def count(text: str, platform: str, loop_length: int = 1) -> Counts:
  """Counts what a program does.

  Args:
    text: `compiled.as_text()`.
    platform: "cpu", "gpu" or "tpu".
    loop_length: of loops whose length the program does not say.
  """
  module = hlo.Module(text, loop_length)
  memory = _Memory(module, _ON_CHIP if platform == "tpu" else None)
  totals, largest = collections.Counter(), 0
  for computation, instruction, times in module.executed():
    if _kind(instruction) in KINDS:
      continue
    name = "other"
    if memory.is_product(instruction):
      name = "matrix"
      largest = max(largest, memory.of_operands(computation, instruction))
    totals[name] += times * memory.traffic(computation, instruction)
    totals["operations"] += times * (instruction.opcode not in _FREE)
  return Counts(
    _collectives(module),
    totals["matrix"],
    totals["other"],
    totals["operations"],
    len(module.unknown_loops),
    largest,
  )


def _collectives(module: hlo.Module) -> tuple[Collective, ...]:
  found = {}
  # A TPU splits one collective over several fusions.
  for _, instruction, times in module.executed(into_fusions=True):
    kind = _kind(instruction)
    if kind not in KINDS:
      continue
    channel = re.search(r"channel_id=(\d+)", instruction.text)
    key = (kind, channel[1]) if channel else instruction.name
    known = found.get(key)
    if known is None or known.times < times:
      found[key] = Collective(
        kind, _payload(instruction), groups.first(instruction.text), times
      )
  return tuple(found.values())


def _kind(instruction: Instruction) -> str:
  """Its opcode, without saying that it may go on while others run."""
  return instruction.opcode.removesuffix("-start")


def _payload(instruction: Instruction) -> int:
  """The larger of input and output of a collective."""
  total, kind = hlo.nbytes(instruction.shape), _kind(instruction)
  size = len(groups.first(instruction.text))
  if instruction.opcode.endswith("-start") and kind != "all-reduce":
    # Its type has both.
    is_uneven = kind in ("all-gather", "reduce-scatter")
    return total * size // (size + 1) if is_uneven else total // 2
  return total * size if kind == "reduce-scatter" else total


class _Memory:
  """Bytes that instructions of a program read and write.

  A fusion reads and writes its arguments and its result, or the slices of them
  that it uses.
  """

  def __init__(self, module: hlo.Module, on_chip: str | None):
    self._module = module
    self._on_chip = on_chip
    # The same fusions are asked about again and again.
    self._is_product_in = functools.cache(self._find_product)
    self._read_of = functools.cache(self._find_read)

  @functools.cached_property
  def _sizes(self) -> dict[str, dict[str, int]]:
    return {
      name: {
        each.name: hlo.nbytes(each.shape, self._on_chip)
        for each in instructions.values()
      }
      for name, instructions in self._module.computations.items()
    }

  def is_product(self, instruction: Instruction) -> bool:
    """Whether it multiplies matrices."""
    if instruction.opcode in ("dot", "convolution"):
      return True
    if instruction.opcode == "custom-call":
      return bool(_MATRIX_CALL.search(instruction.text))
    if instruction.opcode == "fusion":
      return any(map(self._is_product_in, instruction.called))
    return False

  def _find_product(self, name: str) -> bool:
    return any(map(self.is_product, self._module.computations[name].values()))

  def of_operands(self, computation: str, instruction: Instruction) -> int:
    """Bytes of both operands of a product."""
    sizes = self._sizes[computation]
    return sum(sizes.get(each, 0) for each in instruction.operands[:2])

  def traffic(self, computation: str, instruction: Instruction) -> int:
    """Bytes that an instruction reads and writes."""
    opcode, sizes = instruction.opcode, self._sizes[computation]
    if opcode in _FREE or opcode.endswith("-done"):
      return 0
    read = lambda number: sizes.get(instruction.operands[number], 0)
    if opcode in _SLICES:
      return 2 * sizes[instruction.name]
    if opcode in ("dynamic-update-slice", "scatter"):
      return 2 * read(1 if opcode == "dynamic-update-slice" else -1)
    operands = range(len(instruction.operands))
    if opcode.endswith("-start"):  # its type has the operands, too
      return sum(map(read, operands))
    if opcode == "custom-call" and self.is_product(instruction):
      # What follows the result is room to work in.
      return hlo.nbytes_of_first(instruction.shape) + sum(map(read, operands))
    if opcode != "fusion":
      return sizes[instruction.name] + sum(map(read, operands))
    (called,) = instruction.called
    return self._written(called, sizes[instruction.name]) + sum(
      min(self._read_of(called, number), read(number)) for number in operands
    )

  def _find_read(self, name: str, number: int) -> int:
    """Bytes that a fusion reads of one of its arguments: all, or a slice."""
    parameter, total = self._module.parameters(name)[number], 0
    for each in self._module.computations[name].values():
      for place, operand in enumerate(each.operands):
        is_replaced = each.opcode == "dynamic-update-slice" and not place
        if operand != parameter or is_replaced:
          continue
        if each.opcode in _SLICES and not place:
          total += hlo.nbytes(each.shape)
        elif each.opcode == "fusion":
          (called,) = each.called
          total += self._read_of(called, place)
        else:
          return sys.maxsize
    return total

  def _written(self, name: str, size: int) -> int:
    """Bytes that a fusion writes: its result, or the slice it replaces."""
    root = self._module.root(name)
    parts = [self._module.computations[name].get(x) for x in root.operands]
    parts = parts if root.opcode == "tuple" else [root]
    for part in parts:
      if part is not None and part.opcode == "dynamic-update-slice":
        update = self._sizes[name].get(part.operands[1], 0)
        size -= min(size, max(hlo.nbytes(part.shape) - update, 0))
    return size
