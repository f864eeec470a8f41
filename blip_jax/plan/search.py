"""Plans of other batches, remat policies and meshes, and the best of them."""

import itertools
import operator
from collections.abc import Iterator
from typing import NamedTuple

from blip_jax.plan import programs, report
from blip_jax.plan.programs import Program
from blip_jax.plan.topology import Topology
from blip_jax.runtime.config import Config

POLICIES = ("none", "dots", "full")
COLUMNS = ("batch", "remat", "mesh", "GiB", "images/s", "Pareto")


class Row(NamedTuple):
  """A plan of the search.

  Attributes:
    batch_size: of all devices.
    remat: policy of both towers.
    mesh: its axes, such as "data=4, fsdp=2, tensor=1".
    program: None if it was left out.
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


def run(config: Config, topology: Topology) -> Iterator[Row]:
  """Plans half, once and twice the batch, with each policy, on some meshes.

  What does not fit is not tried with a larger batch.
  """
  number, size = len(topology.devices), config.batch_size
  own = dict(config.mesh)
  meshes = [own]
  for fsdp in (1, min(8, number), number):
    mesh = {"data": number // fsdp, "fsdp": fsdp, "tensor": 1}
    if number % fsdp == 0 and mesh not in meshes:
      meshes.append(mesh)
  for mesh, remat in itertools.product(meshes, POLICIES):
    full = False
    for batch_size in (size // 2, size, 2 * size):
      if full:
        yield Row(batch_size, remat, mesh, None, "a smaller batch is too large")
        continue
      try:
        row = _plan(config, topology, batch_size, remat, mesh)
      except ValueError as error:
        yield Row(batch_size, remat, mesh, None, str(error))
        continue
      assert row.program is not None
      full = not report.fits(row.program, topology)
      yield row


def _plan(
  config: Config,
  topology: Topology,
  batch_size: int,
  remat: str,
  mesh: dict[str, int],
) -> Row:
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.batch_size = batch_size
    config.model.vit_remat = config.model.text_remat = remat
    config.mesh.update(mesh)
  program, _ = programs.training(config, topology)
  return Row(batch_size, remat, mesh, program)


def pareto(rows: list[Row], topology: Topology) -> list[Row]:
  """Rows that fit, of which no other is as fast with as little memory."""
  fitting = [
    row for row in rows if row.program and report.fits(row.program, topology)
  ]

  def is_better(one: Row, other: Row) -> bool:
    costs = one.costs, other.costs
    return costs[0] != costs[1] and all(map(operator.le, *costs))

  return [
    row
    for row in fitting
    if not any(is_better(other, row) for other in fitting)
  ]


def line(row: Row, mark: str = "") -> str:
  """A row of the table."""
  mesh = ", ".join(f"{axis}={size}" for axis, size in row.mesh.items())
  memory, rate = "", row.note
  if row.program is not None and row.program.memory is not None:
    memory = f"{row.program.memory / report.GIB:.2f}"
    rate = f"{row.rate:,.0f}"
  elif row.program is not None:
    rate = row.program.note
  cells = (f"{row.batch_size}", row.remat, mesh, memory, rate, mark)
  return f"| {' | '.join(cells)} |"
