"""What a plan says, as lines of text."""

from collections.abc import Iterator, Sequence

from blip_jax.plan import roofline
from blip_jax.plan.programs import Program
from blip_jax.plan.topology import Topology

GIB = 2**30


def fits(program: Program, topology: Topology) -> bool:
  chip = topology.chip
  most = chip.memory * chip.usable
  return program.memory is not None and program.memory <= most


def assumptions(topology: Topology) -> Iterator[str]:
  """The numbers that a prediction stands on."""
  chip, share = topology.chip, roofline.SHARES[topology.chip.platform]
  network = f", network {chip.network / 1e9:.0f}" if chip.network else ""
  yield (
    f"{len(topology.devices)} x {chip.kinds[0]}: {chip.tflops:.4g} TFLOP/s, "
    f"memory {chip.memory / GIB:.2f} GiB at {chip.bandwidth / 1e9:.0f} GB/s, "
    f"links {chip.link / 1e9:.0f}{network} GB/s ({chip.source})"
  )
  yield (
    f"assumed: {share.products:.0%} of the FLOP/s, {share.memory:.0%} of the "
    f"memory's and {share.links:.0%} of the links' bandwidth are reached, "
    f"{chip.per_op * 1e6:.1f} us between operations; nothing overlaps. "
    f"{chip.usable:.0%} of the memory can be used"
  )
  if chip.platform == "cpu":
    yield (
      "times are seconds of processor time of a core; devices that share a "
      "core take turns"
    )
  if chip.platform == "gpu":
    yield (
      "compiled without trying kernels out, and without Triton's; on a GPU the "
      "compiler chooses faster ones. Links and network are modelled"
    )


def of_program(program: Program, topology: Topology) -> Iterator[str]:
  """Memory, collectives, FLOPs and time of a program."""
  yield f"{program.name}, {program.items:,} images a call:"
  yield f"  memory       {_memory(program, topology)}"
  counts, times = program.counts, program.times
  if counts is None or times is None:
    return
  found = roofline.by_kind(counts.collectives)
  yield "  collectives  " + (
    "; ".join(
      f"{kind} {number} x, {size / 1e6:,.1f} MB"
      for kind, (number, size) in found.items()
    )
    or "none"
  )
  reference = (
    f", reference algorithm {program.reference_flops / 1e12:.3f}"
    if program.reference_flops
    else ""
  )
  yield (
    f"  TFLOP        {program.flops / 1e12:.3f} in products{reference} (each "
    "per device)"
  )
  yield (
    f"  bytes        {counts.matrix_bytes / 1e9:.2f} GB for products, "
    f"{counts.other_bytes / 1e9:.2f} GB for all else, in "
    f"{counts.operations:,} operations"
  )
  yield (
    f"  time         {milliseconds(times.expected)} expected: products "
    f"{milliseconds(times.products)}, memory {milliseconds(times.memory)}, "
    f"operations {milliseconds(times.operations)}, collectives "
    f"{milliseconds(times.collectives)}; at best {milliseconds(times.best)}"
  )
  yield f"  MFU          {mfu(program, topology)}"
  if counts.unknown_loops:
    yield (
      f"  loops        {counts.unknown_loops} end early on some inputs; "
      "counted at their full length"
    )


def milliseconds(seconds: float) -> str:
  return f"{seconds * 1e3:,.4g} ms"


def mfu(program: Program, topology: Topology) -> str:
  """From the expected to the best."""
  assert program.times is not None
  flops = program.reference_flops or program.flops
  of = "reference" if program.reference_flops else "computed"
  peak = topology.chip.tflops * 1e12
  low, high = (
    flops / seconds / peak
    for seconds in (program.times.expected, program.times.best)
  )
  return f"{low:.1%} to {high:.1%}, of {of} FLOPs"


def _memory(program: Program, topology: Topology) -> str:
  chip = topology.chip
  most = chip.memory * chip.usable
  if program.memory is None:
    return (
      f"does not fit: the compiler gives up ({program.note}); arguments alone "
      f"{program.arguments / GIB:.2f} GiB of {most / GIB:.2f}"
    )
  says = "fits" if fits(program, topology) else "does not fit"
  return (
    f"{says}: {program.memory / GIB:.2f} of {most / GIB:.2f} GiB (arguments "
    f"{program.arguments / GIB:.2f}, temporary "
    f"{(program.temporary or 0) / GIB:.2f})"
  )


def of_run(
  program: Program, topology: Topology, num_steps: int, price: float | None
) -> Iterator[str]:
  """Device-hours and money of a training, without evaluations."""
  if program.times is None:
    return
  if not num_steps:
    yield (
      "run: the data decide how many steps; --config.num_steps says it here"
    )
    return
  number = len(topology.devices)
  hours = num_steps * program.times.expected / 3600
  yield (
    f"run: {num_steps:,} steps, {hours:,.1f} hours, {hours * number:,.0f} "
    f"device-hours{_money(hours * number, price)}; checkpoints, evaluations "
    "and waiting for data come on top"
  )


def of_labelling(
  found: Sequence[Program],
  topology: Topology,
  images: float,
  price: float | None,
) -> Iterator[str]:
  """Device-hours and money of CapFilt."""
  if any(program.times is None for program in found):
    return
  per_host = sum(1 for d in topology.devices if d.process_index == 0)
  seconds = sum(p.times.expected for p in found if p.times)
  rate = found[0].items / seconds / per_host
  hours = images / rate / 3600
  number = len(topology.devices)
  yield (
    f"run: {rate:,.1f} images/s per device, {rate * number:,.0f} on all "
    f"{number}; {images / 1e9:g} billion images take {hours:,.0f} "
    f"device-hours{_money(hours, price)}, if reading images keeps up"
  )


def _money(hours: float, price: float | None) -> str:
  return "" if price is None else f", {hours * price:,.0f} at {price:g} an hour"
