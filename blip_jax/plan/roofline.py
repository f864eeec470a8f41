"""The time of a program: products, memory and collectives, one after another.

  products      FLOPs at the rate of matrix units, or their bytes if that takes
                longer
  memory        bytes of everything else, at the bandwidth of the memory
  operations    the pause between two of them
  collectives   bytes over the links of a device, as rings send them

`best` overlaps the three perfectly, at the numbers of the data sheet;
`expected` overlaps nothing, at the shares of them that programs reach.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from blip_jax.plan import chips, traffic


class Shares(NamedTuple):
  """The shares of a chip's numbers that a program reaches."""

  products: float
  memory: float
  links: float


# A large product in bfloat16 reached 699 of 989 TFLOP/s on an H100; the other
# shares of accelerators are assumed. On a CPU, steps of the tiny model at 96 to
# 160 pixels reached 0.51 to 0.81 of what large products and arrays reach.
SHARES = {
  "cpu": Shares(0.66, 0.66, 0.66),
  "gpu": Shares(0.7, 0.8, 0.8),
  "tpu": Shares(0.7, 0.8, 0.8),
}


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds of a program.

  Attributes:
    products: expected, of products of matrices.
    memory: expected, of everything else that goes through memory.
    operations: expected, between operations.
    collectives: expected, of communication.
    best: of the program, if everything overlaps.
  """

  products: float
  memory: float
  operations: float
  collectives: float
  best: float

  @property
  def expected(self) -> float:
    return self.products + self.memory + self.operations + self.collectives


def times(
  chip: chips.Chip, per_host: int, flops: float, counts: traffic.Counts
) -> Times:
  """Predicts the time of a program.

  Args:
    chip: one device.
    per_host: devices of a host.
    flops: of products, per device.
    counts: what the program moves, per device.
  """
  share = SHARES[chip.platform]
  compute = flops / (chip.tflops * 1e12)
  matrix = counts.matrix_bytes / chip.bandwidth
  memory = counts.other_bytes / chip.bandwidth
  links = sum(
    each.times * collective_seconds(chip, per_host, each)
    for each in counts.collectives
  )
  return Times(
    max(compute / share.products, matrix / share.memory),
    memory / share.memory,
    counts.operations * chip.per_op,
    links / share.links,
    max(compute, matrix + memory, links),
  )


def collective_seconds(
  chip: chips.Chip, per_host: int, collective: traffic.Collective
) -> float:
  """Of one collective: each device of a group of n sends (n-1)/n of the data,
  twice in an all-reduce.

  Between hosts, the devices of a host share the work of theirs, so that each
  sends its part through its own adapter.
  """
  if collective.kind == "collective-permute":
    crosses = len({d // per_host for d in collective.group}) > 1
    speed = chip.network if crosses and chip.network else chip.link
    return collective.nbytes / speed
  size = len(collective.group)
  hosts = len({device // per_host for device in collective.group})
  rounds = 2 if collective.kind == "all-reduce" else 1
  seconds = _ring(size, collective.nbytes, chip.link)
  if chip.network and hosts > 1:
    local = size // hosts
    seconds = _ring(local, collective.nbytes, chip.link) + _ring(
      hosts, collective.nbytes // local, chip.network
    )
  return rounds * seconds


def _ring(size: int, nbytes: int, speed: float) -> float:
  return (size - 1) / size * nbytes / speed


def by_kind(
  collectives: Sequence[traffic.Collective],
) -> dict[str, tuple[int, int]]:
  """Kind -> how many run, and their bytes."""
  numbers, sizes = collections.Counter(), collections.Counter()
  for each in collectives:
    numbers[each.kind] += each.times
    sizes[each.kind] += each.times * each.nbytes
  return {
    kind: (numbers[kind], sizes[kind])
    for kind in traffic.KINDS
    if numbers[kind]
  }
