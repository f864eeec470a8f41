"""The text of a compiled program: its instructions, and how often each runs.

XLA's own cost analysis counts the body of a loop once, and a training step is
loops over layers; here a body runs as often as its loop does.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0, "u4": 4, "s4": 4}
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations=\{)=?%([\w.\-]+)")


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

  @property
  def called(self) -> list[str]:
    """Computations that it applies, such as the one of a fusion."""
    return _CALLED.findall(self.text)


class Module:
  """A program: computations, which are instructions by name.

  Attributes:
    computations: by name.
    unknown_loops: names of loops of unknown length that were met so far.
  """

  def __init__(self, text: str, loop_length: int = 1):
    """Reads a program.

    Args:
      text: `compiled.as_text()`.
      loop_length: of loops whose length the program does not say.
    """
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.unknown_loops: set[str] = set()
    self._loop_length = loop_length
    self._entry = ""
    # One for each computation, which fusions and loops ask about again.
    self.parameters = functools.cache(self._find_parameters)
    current = None
    for line in text.splitlines():
      if header := _HEADER.match(line):
        current = self.computations.setdefault(header[2], {})
        if header[1]:
          self._entry = header[2]
      elif line.startswith("}"):
        current = None
      elif current is not None and (found := _INSTRUCTION.match(line)):
        instruction = _instruction(found)
        if instruction is not None:
          current[instruction.name] = instruction

  def executed(
    self, into_fusions: bool = False
  ) -> Iterator[tuple[str, Instruction, int]]:
    """What runs one after another.

    Args:
      into_fusions: also what fusions are made of.

    Yields:
      The name of a computation, an instruction of it, and how often it runs.
    """
    return self._executed(self._entry, 1, into_fusions)

  def _executed(
    self, name: str, times: int, into_fusions: bool
  ) -> Iterator[tuple[str, Instruction, int]]:
    for instruction in self.computations[name].values():
      yield name, instruction, times
      bodies = self._bodies(instruction)
      if into_fusions and instruction.opcode == "fusion":
        bodies = [(called, 1) for called in instruction.called]
      for called, each in bodies:
        yield from self._executed(called, times * each, into_fusions)

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
      return [(max(names, key=lambda n: len(self.computations[n])), 1)]
    if instruction.opcode in ("call", "async-start"):
      return [(name, 1) for name in instruction.called]
    return []

  def _trips(self, loop: Instruction) -> int:
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.text):
      return int(known[1])
    if condition := re.search(r"condition=%?([\w.\-]+)", loop.text):
      tested = [*self._with_called(condition[1])]
      limits = {x for each in tested for x in _integers(each)}
      if len(limits) == 1 and any(x.opcode == "compare" for x in tested):
        return max(limits.pop(), 1)
    self.unknown_loops.add(loop.name)
    return self._loop_length

  def _with_called(self, name: str) -> Iterator[Instruction]:
    """Instructions of a computation, and of those that it applies."""
    for instruction in self.computations[name].values():
      yield instruction
      for called in instruction.called:
        yield from self._with_called(called)

  def root(self, name: str) -> Instruction:
    """The instruction that makes the result of a computation."""
    return next(x for x in self.computations[name].values() if x.is_root)

  def _find_parameters(self, name: str) -> dict[int, str]:
    return {
      int(re.findall(r"^\((\d+)\)", each.text)[0]): each.name
      for each in self.computations[name].values()
      if each.opcode == "parameter"
    }


def _integers(instruction: Instruction) -> list[int]:
  """The value of a constant that is an integer scalar."""
  if instruction.opcode != "constant" or instruction.shape[:2] != "s3":
    return []
  return [int(x) for x in re.findall(r"^\((-?\d+)\)", instruction.text)]


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


def nbytes(shape: str, skipped: str | None = None) -> int:
  """Of all arrays of a type, but for those in a memory that is skipped.

  Args:
    shape: the text of a type, such as "(f32[8,16]{1,0}, s32[])".
    skipped: part of a layout, such as "S(1)".
  """
  return sum(
    _nbytes(each)
    for each in _SHAPE.finditer(shape)
    if skipped is None or skipped not in (each[3] or "")
  )


def nbytes_of_first(shape: str) -> int:
  """Of the first array of a type; 0 if it has none."""
  found = _SHAPE.search(shape)
  return _nbytes(found) if found else 0


def _nbytes(array: re.Match) -> int:
  dtype = array[1]
  bits = _BITS.get(dtype)
  if bits is None:
    bits = int(re.findall(r"\d+", dtype)[0]) if re.search(r"\d", dtype) else 0
  sizes = [int(size) for size in array[2].split(",") if size]
  return math.prod(sizes) * bits // 8
