"""Plans of other batches, remat policies and meshes, and the best of them."""

import dataclasses
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from blip_jax import build, context
from blip_jax.models.config import REMAT_POLICIES
from blip_jax.plan import programs, report
from blip_jax.plan.programs import Program
from blip_jax.plan.topology import Topology
from blip_jax.runtime import sharding
from blip_jax.runtime.config import Config

COLUMNS = ("batch", "remat", "mesh", "GiB", "images/s")
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


class Row(NamedTuple):
  """A plan of the search.

  Attributes:
    batch_size: of all devices.
    remat: policy of both towers.
    mesh: its axes, such as "data=4, fsdp=2, tensor=1".
    program: without what was compiled, which many rows would fill the memory
      with; None if it was left out.
    note: why it was.
  """

  batch_size: int
  remat: str
  mesh: dict[str, int]
  program: Program | None
  note: str = ""

  @property
  def rate(self) -> float:
    """Images a second."""
    assert self.program is not None and self.program.times is not None
    return self.batch_size / self.program.times.expected

  @property
  def costs(self) -> tuple[int, float]:
    """Of which less is better."""
    assert self.program is not None and self.program.memory is not None
    return self.program.memory, -self.rate


def meshes(config: Config, topology: Topology) -> list[dict[str, int]]:
  """The recipe's mesh, and some with other sizes of `fsdp`.

  Raises:
    ValueError: the recipe is wrong, or does not fit the topology.
  """
  config = context.complete(config)
  build.validate(config)
  found = [dict(build.make_mesh(config, topology.devices).shape)]
  number = len(topology.devices)
  for fsdp in (1, 8, number):
    mesh = dict(zip(sharding.AXES, (number // fsdp, fsdp, 1), strict=True))
    if number % fsdp == 0 and mesh not in found:
      found.append(mesh)
  return found


def run(
  config: Config, topology: Topology, tried: Sequence[dict[str, int]]
) -> Iterator[Row]:
  """Plans half, once and twice the batch, with each policy, on some meshes.

  What does not fit is not tried with a larger batch.
  """
  size = config.batch_size
  batch_sizes = sorted({max(size // 2, 1), size, 2 * size})
  for mesh, remat in itertools.product(tried, REMAT_POLICIES):
    full = False
    for batch_size in batch_sizes:
      if full:
        yield Row(batch_size, remat, mesh, None, "a smaller batch is too large")
        continue
      try:
        program = _plan(config, topology, batch_size, remat, mesh)
      except ValueError as error:
        yield Row(batch_size, remat, mesh, None, str(error))
        continue
      full = not report.fits(program, topology)
      yield Row(batch_size, remat, mesh, program)


def _plan(
  config: Config,
  topology: Topology,
  batch_size: int,
  remat: str,
  mesh: dict[str, int],
) -> Program:
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.batch_size = batch_size
    config.model.vit_remat = config.model.text_remat = remat
    config.mesh.update(mesh)
  program, _ = programs.training(config, topology)
  return dataclasses.replace(program, compiled=None)


def pareto(rows: Sequence[Row], topology: Topology) -> list[Row]:
  """Rows that fit, of which no other is as fast with as little memory.

  The smallest comes first.
  """
  fitting = [
    row for row in rows if row.program and report.fits(row.program, topology)
  ]

  def is_better(one: Row, other: Row) -> bool:
    costs = one.costs, other.costs
    return costs[0] != costs[1] and all(map(operator.le, *costs))

  best = [
    row
    for row in fitting
    if not any(is_better(other, row) for other in fitting)
  ]
  return sorted(best, key=lambda row: row.costs)


def line(row: Row, topology: Topology) -> str:
  """A row of the table."""
  mesh = ", ".join(f"{axis}={size}" for axis, size in row.mesh.items())
  memory, rate, program = "", row.note, row.program
  if program is not None and program.memory is not None:
    memory = f"{program.memory / report.GIB:.2f}"
    rate = f"{row.rate:,.0f}"
  if program is not None and not report.fits(program, topology):
    rate = f"does not fit {program.note}".rstrip()
  cells = (f"{row.batch_size}", row.remat, mesh, memory, rate)
  return f"| {' | '.join(cells)} |"
