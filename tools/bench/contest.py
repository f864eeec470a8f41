"""A program against its peers: the same outputs, then turns."""

import contextlib
import functools
import gc
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from . import measure
from .programs import Setup

# (setup, batch size) -> a program.
Make = Callable[[Setup, int], measure.Program]

# Images whose outputs are compared.
NUM_COMPARED = 2
# How much outputs may differ, relative to their norm; ids may not differ at all
# in float32, and are not compared in other dtypes, in which a search for the
# best text may well end at another one.
LIMITS = {"float32": 1e-4, "bfloat16": 0.05, "float8": 0.15}
# The peer of a program in float8: the same in this dtype.
UNROUNDED = "bfloat16"


def run(
  native: Make,
  peers: Mapping[str, Make | str],
  setup: Setup,
  batch_sizes: list[int],
  repeats: int,
  compared: Mapping[str, Make] | None = None,
) -> tuple[measure.Program, dict[str, Any], dict[str, dict[str, Any]]]:
  """Measures a program and its peers, each at its best batch size.

  Args:
    native: makes our program.
    peers: make the others by name; or why one cannot be there.
    setup: see `programs.Setup`.
    batch_sizes: to try, ascending.
    repeats: calls of each program.
    compared: programs by name ("native" is ours) whose outputs are compared, if
      not those of the programs that are measured.

  Returns:
    Our program, its numbers, and by name those of the peers: with a `ratio` if
    the outputs are the same, else with a `note` that says what is wrong.
  """
  program, outputs, numbers = best(native, setup, batch_sizes)
  programs = {"native": program}
  in_float32 = _Float32(compared or {"native": native, **peers}, setup)
  results: dict[str, dict[str, Any]] = {}
  for name, make in peers.items():
    if isinstance(make, str):
      results[name] = {"note": make}
      continue
    with _noted(name, results):
      other, others, results[name] = best(make, setup, batch_sizes)
      differences = {}
      if compared is None:
        differences[setup.dtype] = difference(outputs, others)
      if "float32" not in differences and name != UNROUNDED:
        differences["float32"] = in_float32.difference(name)
      results[name]["differences"] = differences
      note = _note(differences, compared is None and _is_ids(outputs))
      if note:
        results[name]["note"] = note
      else:
        programs[name] = other

  seconds = measure.in_turns(programs, repeats)
  numbers |= measure.summary(program, seconds["native"])
  for name in programs.keys() - {"native"}:
    results[name] |= measure.summary(programs[name], seconds[name])
    ratio = numbers["per_second"] / results[name]["per_second"]
    results[name]["ratio"] = ratio
  return program, numbers, results


@contextlib.contextmanager
def _noted(name: str, results: dict[str, dict[str, Any]]):
  """A peer that fails costs its column only."""
  results[name] = {}
  try:
    yield
  except Exception as error:
    results[name] = {"note": describe(error)}
  finally:
    # What it leaves on a GPU is not in the way of the next one.
    gc.collect()


def describe(error: Exception) -> str:
  """An exception in a line."""
  if isinstance(error, ModuleNotFoundError):
    return f"needs {error.name}, which is not installed"
  text = f"{type(error).__name__}: {error}"
  return " ".join(text.split())[:300]


def best(
  make: Make, setup: Setup, batch_sizes: list[int]
) -> tuple[measure.Program, Any, dict[str, Any]]:
  """The program of the batch size with the most items per second.

  Larger ones than the first that fails, for lack of memory, are not tried.

  Returns:
    The program, its outputs, and its numbers.
  """
  chosen, outputs, numbers = None, None, {}
  tried: dict[int, float | str] = {}
  most = 0.0
  for batch_size in batch_sizes:
    try:
      with measure.compiling() as stages:
        program = make(setup, batch_size)
        found = program.run()
      if len(batch_sizes) > 1:
        tried[batch_size] = program.items / measure.seconds_of(program.run)
    except Exception as error:
      if chosen is None:
        raise
      tried[batch_size] = describe(error)
      break
    rate = float(tried.get(batch_size, 1.0))
    if rate > most:
      chosen, outputs, most = program, found, rate
      numbers = {f"{name}_seconds": each for name, each in stages.items()}
  assert chosen is not None
  return chosen, outputs, numbers | ({"tried": tried} if tried else {})


class _Float32:
  """Outputs in float32 at full precision, of programs by name."""

  def __init__(self, makes: Mapping[str, Any], setup: Setup):
    self._makes, self._setup = makes, setup.exact

  @functools.cached_property
  def _native(self) -> Any:
    return self._outputs("native")

  def _outputs(self, name: str) -> Any:
    # Products of GPUs and TPUs round float32 operands by default.
    with jax.default_matmul_precision("highest"):
      return self._makes[name](self._setup, NUM_COMPARED).run()

  def difference(self, name: str) -> float:
    """That of a program to ours."""
    return difference(self._native, self._outputs(name))


def _note(differences: Mapping[str, float], of_ids: bool) -> str:
  """What is wrong with some outputs; "" if nothing is."""
  for dtype, found in differences.items():
    if found > LIMITS[dtype] and (dtype == "float32" or not of_ids):
      return f"outputs differ in {dtype} ({found:.1e})"
  return ""


def difference(native: Any, peer: Any) -> float:
  """Of the images that both have, relative to the norm; of ids, the share of
  those that differ."""
  x, y = np.array(native), np.array(getattr(peer, "cpu", lambda: peer)())
  number = min(len(x), len(y))
  x, y = x[:number], y[:number]
  if x.shape != y.shape:
    return float("inf")
  if _is_ids(x):
    return float(np.mean(x != y))
  x, y = x.astype(np.float64), y.astype(np.float64)
  return float(np.linalg.norm(x - y) / np.linalg.norm(x))


def _is_ids(x: Any) -> bool:
  return "int" in str(x.dtype)
