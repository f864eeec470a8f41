"""What a compiled program moves: collectives, and bytes of memory.

Read from the text of the optimised program of one device. XLA's own cost
analysis counts the body of a loop once, and a training step is loops over
layers; here a body counts as often as it runs.
"""

import collections
import dataclasses
import functools
import math
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)

_BITS = {"pred": 8, "token": 0, "opaque": 0, "u4": 4, "s4": 4}
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations=\{)=?%([\w.\-]+)")
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
# The memory of a TPU that is next to its units; elsewhere the same number
# means other things.
_ON_CHIP = "S(1)"


class Instruction(NamedTuple):
  """A line of a program.

  Attributes:
    name: of its result.
    shape: the text of its type, with layouts.
    opcode: such as "fusion".
    operands: names of its arguments.
    text: what follows the opcode: arguments and attributes.
    is_root: whether it is the result of its computation.
  """

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  text: str
  is_root: bool


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
  return _Program(text, platform, loop_length).counts()


class _Program:
  """The computations of a program by name."""

  def __init__(self, text: str, platform: str, loop_length: int):
    self._computations: dict[str, dict[str, Instruction]] = {}
    self._on_chip = _ON_CHIP if platform == "tpu" else None
    self._loop_length = loop_length
    self._entry, self._unknown = "", set()
    # The same fusions are asked about again and again.
    self._is_product_in = functools.cache(self._find_product)
    self._parameters = functools.cache(self._find_parameters)
    self._read_of = functools.cache(self._find_read)
    current = None
    for line in text.splitlines():
      if header := _HEADER.match(line):
        current = self._computations.setdefault(header[2], {})
        if header[1]:
          self._entry = header[2]
      elif line.startswith("}"):
        current = None
      elif current is not None and (found := _INSTRUCTION.match(line)):
        instruction = _instruction(found)
        if instruction is not None:
          current[instruction.name] = instruction

  def counts(self) -> Counts:
    totals = collections.Counter()
    collectives, largest = {}, 0
    for computation, instruction, times in self._executed(self._entry, 1):
      kind = instruction.opcode.removesuffix("-start")
      if kind in KINDS:
        continue
      name = "other"
      if self._is_product(instruction):
        name, sizes = "matrix", self._sizes[computation]
        operands = sum(sizes.get(each, 0) for each in instruction.operands[:2])
        largest = max(largest, operands)
      totals[name] += times * self._traffic(computation, instruction)
      totals["operations"] += times * (instruction.opcode not in _FREE)
    # A TPU splits one collective over several fusions.
    for times, instruction in self._all_collectives():
      kind = instruction.opcode.removesuffix("-start")
      channel = re.search(r"channel_id=(\d+)", instruction.text)
      key = (kind, channel[1]) if channel else instruction.name
      known = collectives.get(key)
      if known is None or known.times < times:
        collectives[key] = Collective(
          kind, self._payload(instruction), _group(instruction.text), times
        )
    return Counts(
      tuple(collectives.values()),
      totals["matrix"],
      totals["other"],
      totals["operations"],
      len(self._unknown),
      largest,
    )

  def _executed(
    self, name: str, times: int
  ) -> Iterator[tuple[str, Instruction, int]]:
    """Instructions that run one after another, and how often each does."""
    for instruction in self._computations[name].values():
      yield name, instruction, times
      for called, each in self._bodies(instruction):
        yield from self._executed(called, times * each)

  def _bodies(self, instruction: Instruction) -> list[tuple[str, int]]:
    """The computations that an instruction runs, and how often."""
    text = instruction.text
    if instruction.opcode == "while":
      body = re.search(r"body=%?([\w.\-]+)", text)
      assert body is not None, text
      return [(body[1], self._trips(instruction))]
    if instruction.opcode == "conditional":
      branches = re.search(r"branch_computations=\{([^}]*)\}", text)
      names = (
        _OPERAND.findall(branches[1])
        if branches
        else re.findall(r"(?:true|false)_computation=%([\w.\-]+)", text)
      )
      # The one that is not a constant.
      return [(max(names, key=lambda n: len(self._computations[n])), 1)]
    if instruction.opcode in ("call", "async-start"):
      return [(name, 1) for name in _CALLED.findall(text)]
    return []

  def _trips(self, loop: Instruction) -> int:
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.text):
      return int(known[1])
    if condition := re.search(r"condition=%?([\w.\-]+)", loop.text):
      limits = self._constants(condition[1])
      if len(limits) == 1 and "compare" in self._opcodes(condition[1]):
        return max(limits.pop(), 1)
    self._unknown.add(loop.name)
    return self._loop_length

  def _constants(self, name: str) -> set[int]:
    """Integer scalars of a computation and of those that it calls."""
    found = set()
    for instruction in self._computations[name].values():
      if instruction.opcode == "constant" and instruction.shape[:2] == "s3":
        found |= {int(x) for x in re.findall(r"^\((-?\d+)\)", instruction.text)}
      for called in _CALLED.findall(instruction.text):
        found |= self._constants(called)
    return found

  def _opcodes(self, name: str) -> set[str]:
    found = set()
    for instruction in self._computations[name].values():
      found.add(instruction.opcode)
      for called in _CALLED.findall(instruction.text):
        found |= self._opcodes(called)
    return found

  def _all_collectives(self) -> Iterator[tuple[int, Instruction]]:
    """Also those within fusions."""

    def within(name: str, times: int) -> Iterator[tuple[int, Instruction]]:
      for instruction in self._computations[name].values():
        if instruction.opcode.removesuffix("-start") in KINDS:
          yield times, instruction
        bodies = self._bodies(instruction)
        if instruction.opcode == "fusion":
          bodies = [(called, 1) for called in _CALLED.findall(instruction.text)]
        for called, each in bodies:
          yield from within(called, times * each)

    return within(self._entry, 1)

  @functools.cached_property
  def _sizes(self) -> dict[str, dict[str, int]]:
    return {
      name: {
        each.name: _nbytes(each.shape, self._on_chip)
        for each in instructions.values()
      }
      for name, instructions in self._computations.items()
    }

  def _payload(self, instruction: Instruction) -> int:
    """The larger of input and output of a collective."""
    total = _nbytes(instruction.shape)
    kind = instruction.opcode.removesuffix("-start")
    size = len(_group(instruction.text))
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
      # Its type has both.
      is_uneven = kind in ("all-gather", "reduce-scatter")
      return total * size // (size + 1) if is_uneven else total // 2
    return total * size if kind == "reduce-scatter" else total

  def _find_product(self, name: str) -> bool:
    return any(map(self._is_product, self._computations[name].values()))

  def _is_product(self, instruction: Instruction) -> bool:
    if instruction.opcode in ("dot", "convolution"):
      return True
    if instruction.opcode == "custom-call":
      return bool(_MATRIX_CALL.search(instruction.text))
    if instruction.opcode == "fusion":
      return any(map(self._is_product_in, _CALLED.findall(instruction.text)))
    return False

  def _traffic(self, computation: str, instruction: Instruction) -> int:
    """Bytes that an instruction reads and writes in memory."""
    opcode, sizes = instruction.opcode, self._sizes[computation]
    if opcode in _FREE or opcode.endswith("-done"):
      return 0
    read = lambda number: sizes.get(instruction.operands[number], 0)
    if opcode in ("dynamic-slice", "gather", "slice"):
      return 2 * sizes[instruction.name]
    if opcode in ("dynamic-update-slice", "scatter"):
      return 2 * read(1 if opcode == "dynamic-update-slice" else -1)
    operands = range(len(instruction.operands))
    if opcode.endswith("-start"):  # its type has the operands, too
      return sum(map(read, operands))
    if opcode == "custom-call" and self._is_product(instruction):
      # What follows the result is room to work in.
      result = _SHAPE.search(instruction.shape)
      written = _of_match(result) if result else 0
      return written + sum(map(read, operands))
    if opcode != "fusion":
      return sizes[instruction.name] + sum(map(read, operands))
    (called,) = _CALLED.findall(instruction.text)
    return self._written(called, sizes[instruction.name]) + sum(
      min(self._read_of(called, number), read(number)) for number in operands
    )

  def _find_parameters(self, name: str) -> dict[int, str]:
    return {
      int(re.findall(r"^\((\d+)\)", each.text)[0]): each.name
      for each in self._computations[name].values()
      if each.opcode == "parameter"
    }

  def _find_read(self, name: str, number: int) -> int:
    """Bytes that a fusion reads of one of its arguments: all, or a slice."""
    parameter, total = self._parameters(name)[number], 0
    for each in self._computations[name].values():
      for place, operand in enumerate(each.operands):
        if operand != parameter:
          continue
        if each.opcode in ("dynamic-slice", "gather", "slice") and not place:
          total += _nbytes(each.shape)
        elif each.opcode == "dynamic-update-slice" and not place:
          total += 0
        elif each.opcode == "fusion":
          (called,) = _CALLED.findall(each.text)
          total += self._read_of(called, place)
        else:
          return sys.maxsize
    return total

  def _written(self, name: str, size: int) -> int:
    """Bytes that a fusion writes: its result, or the slice it replaces."""
    root = next(x for x in self._computations[name].values() if x.is_root)
    parts = [self._computations[name].get(x) for x in root.operands]
    parts = parts if root.opcode == "tuple" else [root]
    for part in parts:
      if part is not None and part.opcode == "dynamic-update-slice":
        update = self._sizes[name].get(part.operands[1], 0)
        size -= min(size, max(_nbytes(part.shape) - update, 0))
    return size


def _instruction(found: re.Match) -> Instruction | None:
  rest = found[3]
  opcode = _OPCODE.search(f" {rest}" if rest[0] != "(" else rest)
  if opcode is None:
    return None
  begin = opcode.start() - (rest[0] != "(")
  shape, text = rest[: max(begin, 0)], rest[begin + len(opcode[1]) + 1 :]
  operands = _OPERAND.findall(_arguments(text))
  return Instruction(
    found[2], shape, opcode[1], tuple(operands), text, bool(found[1])
  )


def _arguments(text: str) -> str:
  """What is between the first parenthesis and the one that closes it."""
  depth = 0
  for place, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return text[1:place]
  return text


def _of_match(shape: re.Match) -> int:
  dtype = shape[1]
  bits = _BITS.get(dtype)
  if bits is None:
    bits = int(re.findall(r"\d+", dtype)[0]) if re.search(r"\d", dtype) else 0
  sizes = [int(size) for size in shape[2].split(",") if size]
  return math.prod(sizes) * bits // 8


def _nbytes(shape: str, skipped: str | None = None) -> int:
  """Of all arrays of a type, but for those in a memory that is skipped."""
  return sum(
    _of_match(each)
    for each in _SHAPE.finditer(shape)
    if skipped is None or skipped not in (each[3] or "")
  )


def _group(text: str) -> tuple[int, ...]:
  """The first group of devices of a collective."""
  if mesh := re.search(r"replica_groups=\w+\[([^\]]*)\] ?\{([^}]*)\}", text):
    sizes = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    used = re.findall(r"'(\w+)'", mesh[2])
    devices = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
    index = tuple(slice(None) if axis in used else 0 for axis in sizes)
    return tuple(int(x) for x in devices[index].reshape(-1))
  iota = re.search(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
  )
  if iota:
    numbers = lambda x: [int(n) for n in x.split(",")]
    devices = np.arange(math.prod(numbers(iota[2]))).reshape(numbers(iota[2]))
    if iota[3]:
      devices = devices.transpose(numbers(iota[3]))
    return tuple(int(x) for x in devices.reshape(numbers(iota[1]))[0])
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
    return tuple(int(n) for n in listed[1].split(",") if n)
  if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
    return int(pairs[1]), int(pairs[2])
  return (0,)
