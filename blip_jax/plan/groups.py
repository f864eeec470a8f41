"""The devices that take part in a collective, from its text.

They are listed, or axes of a mesh, whose devices may be in another order, or
numbers from 0 in an array that is transposed and reshaped.
"""

import math
import re

import numpy as np

_MESH = re.compile(
  r"replica_groups=\w+\[(?P<sizes>[^\]]*)\](?:, device_ids=\((?P<order>\S*)\))?"
  r" ?\{(?P<used>[^}]*)\}"
)
_AXIS = re.compile(r"'(\w+)'=(\d+)")
_PART = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")
_IOTA_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_IOTA = re.compile(
  r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
)


def first(text: str) -> tuple[int, ...]:
  """The first group of devices of a collective.

  Args:
    text: of the instruction.

  Returns:
    Numbers of devices; (0,) if it names none.

  Raises:
    ValueError: its groups are written in a way that is not known here.
  """
  if mesh := _MESH.search(text):
    return _group_of_mesh(mesh)
  if iota := _IOTA.search(text):
    groups = _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))
    return tuple(map(int, groups[0]))
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
    return tuple(_numbers(listed[1]))
  if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
    return int(pairs[1]), int(pairs[2])
  if unknown := re.search(r"replica_groups=(?!\{\})", text):
    found = text[unknown.start() :][:100]
    raise ValueError(
      "groups of devices: expected a list, a mesh or [groups,size]<=[devices] "
      f"in the compiled program, found {found!r}"
    )
  return (0,)


def _group_of_mesh(found: re.Match) -> tuple[int, ...]:
  """Devices that differ in some axes of a mesh, or in factors of them.

  `'a':(2)4` is the factor 4 of an axis, after a factor of 2.
  """
  sizes = {name: int(size) for name, size in _AXIS.findall(found["sizes"])}
  devices = np.arange(math.prod(sizes.values()))
  if order := _IOTA_ORDER.fullmatch(found["order"] or ""):
    devices = _iota(order[1], order[2])
  elif found["order"]:
    devices = np.array(_numbers(found["order"]))
  used = {name: [] for name in sizes}
  for name, before, size in _PART.findall(found["used"]):
    part = (int(before), int(size)) if size else (1, sizes[name])
    used[name].append(part)
  shape, index = [], []
  for name, size in sizes.items():
    done = 1
    for before, part in sorted(used[name]):
      shape += [before // done, part]
      index += [0, slice(None)]
      done = before * part
    shape.append(size // done)
    index.append(0)
  return tuple(map(int, devices.reshape(shape)[tuple(index)].reshape(-1)))


def _iota(sizes: str, order: str | None) -> np.ndarray:
  """Numbers from 0 in an array of some sizes, whose axes are reordered."""
  devices = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
  return devices.transpose(_numbers(order)) if order else devices


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(",") if number]
