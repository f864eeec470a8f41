"""Time, compilation and memory of programs, and what their device can do."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from blip_jax.models import float8
from blip_jax.plan import chips
from blip_jax.runtime import files

# Repetitions end after this many seconds, but not before there are three.
SECONDS = 90
MIN_REPEATS = 3

# Events of JAX, and what they are a part of.
_STAGES = {
  "/jax/core/compile/jaxpr_trace_duration": "lowering",
  "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
  "/jax/core/compile/backend_compile_duration": "compiling",
}


@dataclasses.dataclass(frozen=True)
class Program:
  """Something to measure.

  Attributes:
    items: images, or pairs, of a call.
    run: does it, waits until it is done, and returns its outputs.
    compiled: the program, if it is a single one of XLA.
    nbytes: what a call reads and writes at least, if `compiled` cannot tell.
  """

  items: int
  run: Callable[[], Any]
  compiled: Any = None
  nbytes: int = 0


def of_function(items: int, function: Callable, *args: Any) -> Program:
  """A program of a function of arrays, compiled by XLA."""
  compiled = jax.jit(function).lower(*args).compile()
  run = lambda: jax.block_until_ready(compiled(*args))
  return Program(items, run, compiled)


def nbytes(tree: Any) -> int:
  return sum(x.nbytes for x in jax.tree.leaves(tree))


@contextlib.contextmanager
def compiling() -> Iterator[dict[str, float]]:
  """Seconds that JAX needs for lowering and for compiling in the block.

  They are there at its end.
  """
  seconds: dict[str, float] = {}
  spans = {stage: [] for stage in _STAGES.values()}

  def listen(event: str, duration_secs: float, **_: Any) -> None:
    if event in _STAGES:
      end = time.perf_counter()
      spans[_STAGES[event]].append((end - duration_secs, end))

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield seconds
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
    seconds.update({stage: _covered(own) for stage, own in spans.items()})


def _covered(spans: list[tuple[float, float]]) -> float:
  """Time in any of the spans: a function is lowered within another one."""
  total, covered_to = 0.0, 0.0
  for begin, end in sorted(spans):
    total += max(end - max(begin, covered_to), 0.0)
    covered_to = max(covered_to, end)
  return total


def seconds_of(run: Callable[[], Any]) -> float:
  begin = time.perf_counter()
  run()
  return time.perf_counter() - begin


def in_turns(
  programs: Mapping[str, Program], repeats: int
) -> dict[str, list[float]]:
  """Seconds of each call, the programs taking turns.

  So whatever else the machine does meanwhile disturbs all of them alike. They
  must have run before.
  """
  seconds: dict[str, list[float]] = {name: [] for name in programs}
  begin = time.perf_counter()
  for number in range(repeats):
    late = time.perf_counter() - begin > SECONDS
    if late and number >= MIN_REPEATS:
      break
    for name, program in programs.items():
      seconds[name].append(seconds_of(program.run))
  return seconds


def summary(program: Program, seconds: list[float]) -> dict[str, Any]:
  """Items per second by the median of the calls, and their spread."""
  median = statistics.median(seconds)
  low, _, high = (
    statistics.quantiles(seconds, n=4, method="inclusive")
    if len(seconds) > 1
    else seconds * 3
  )
  return {
    "batch_size": program.items,
    "repeats": len(seconds),
    "per_second": program.items / median,
    "ms": median * 1e3,
    "ms_quartiles": [low * 1e3, high * 1e3],
  }


def memory(program: Program) -> dict[str, float]:
  """Gigabytes that a program needs, as XLA says and as the device says."""
  gigabytes = {}
  if program.compiled is not None:
    analysis = program.compiled.memory_analysis()
    if analysis is not None:
      gigabytes["temporary_gb"] = analysis.temp_size_in_bytes / 1e9
      gigabytes["arguments_gb"] = analysis.argument_size_in_bytes / 1e9
  stats = jax.devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    # Of all that JAX has done so far: the device does not forget.
    gigabytes["peak_so_far_gb"] = stats["peak_bytes_in_use"] / 1e9
  return gigabytes


def intensity(program: Program, flops: int) -> float:
  """FLOPs per byte that a program moves.

  Args:
    program: if it is one of XLA, this is XLA's count. It counts the body of a
      loop once, operations and bytes alike.
    flops: of a call; for other programs, with the bytes that they move at
      least.
  """
  cost = program.compiled.cost_analysis() if program.compiled else None
  if cost and cost.get("flops", 0) > 0 and cost.get("bytes accessed", 0) > 0:
    return cost["flops"] / cost["bytes accessed"]
  return flops / program.nbytes


@functools.cache
def peaks(dtype: str) -> dict[str, float]:
  """What the device reaches: TFLOP/s of a product of matrices of a dtype, and
  GB/s of adding two arrays."""
  on_cpu = jax.default_backend() == "cpu"
  side, length = (2048, 1 << 24) if on_cpu else (8192, 1 << 28)
  x = jnp.ones((side, side), float8.KIND if dtype == float8.NAME else dtype)
  y = jnp.ones(length, jnp.float32)
  multiply = functools.partial(
    jnp.matmul, preferred_element_type=float8.activations(dtype)
  )
  product = functools.partial(jax.jit(multiply), x, x)
  add = functools.partial(jax.jit(jnp.add), y, y)
  return {
    "tflops": 2 * side**3 / _shortest(product) / 1e12,
    # Both operands are the same array.
    "gigabytes_per_second": 2 * y.nbytes / _shortest(add) / 1e9,
  }


def _shortest(run: Callable[[], jax.Array], calls: int = 3) -> float:
  """Seconds of a call in the best of some series of them."""
  jax.block_until_ready(run())

  def series() -> None:
    for _ in range(calls):
      last = run()
    last.block_until_ready()

  return min(seconds_of(series) for _ in range(10)) / calls


def datasheet(device_kind: str, dtype: str) -> dict[str, float] | None:
  """As `peaks`, by the data sheet; None if there is none for it.

  Variants with other numbers, such as an H100 PCIe, are not in the table.
  """
  chip = chips.of_kind(device_kind)
  if dtype != "bfloat16" or chip is None:
    return None
  return {
    "tflops": chip.tflops,
    "gigabytes_per_second": chip.bandwidth / 1e9,
  }


def device_kind() -> str:
  """Of the device that programs run on; of a CPU, its model."""
  kind = jax.devices()[0].device_kind
  info = "/proc/cpuinfo"
  if kind != "cpu" or not files.exists(info):
    return kind
  for line in files.read_text(info).splitlines():
    if line.startswith("model name"):
      return line.partition(":")[2].strip()
  return platform.machine()


@functools.cache
def versions() -> dict[str, str]:
  """Versions of what takes part, and the commit of this code."""
  found = {"python": platform.python_version(), "commit": _commit()}
  for name in ("jax", "jaxlib", "torch", "transformers"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


def _commit() -> str:
  """With "+" if files differ from it; "unknown" outside of a checkout."""
  folder = pathlib.Path(__file__).resolve().parent
  git = lambda *words: subprocess.run(
    ["git", "-C", folder, *words], capture_output=True, text=True, check=True
  ).stdout.strip()
  try:
    return git("rev-parse", "--short", "HEAD") + (
      "+" if git("status", "--porcelain", "--untracked-files=no") else ""
    )
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
