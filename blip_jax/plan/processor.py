"""What this machine's processor can do, measured.

In processor time, which other processes on the machine hardly change: rates are
per second of one core.
"""

import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from blip_jax.plan import chips
from blip_jax.runtime import host

# Sizes of activations of a small model, which caches hold.
_SIDE, _ROWS = 512, 4096
_CHAIN = 400
# Of a series of calls.
_SECONDS = 0.15


def measure(num_devices: int) -> chips.Chip:
  """The processor as a chip: a device of its is a core.

  Args:
    num_devices: that share the memory of the machine.
  """
  host.keep_freed_memory()  # as jobs do
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  square, wide = jnp.ones((_SIDE, _SIDE)), jnp.ones((_ROWS, _SIDE))
  product = seconds(lambda x: x @ x, square)
  passes = [
    seconds(function, wide)
    for function in (jax.nn.softmax, _gelu, _layer_norm, lambda x: x + 1)
  ]
  bandwidth = len(passes) * 2 * wide.nbytes / sum(passes)
  copy = 2 * wide.nbytes / passes[-1]
  return chips.Chip(
    ("cpu",),
    "cpu",
    2 * _SIDE**3 / product / 1e12,
    memory // num_devices,
    1.0,
    bandwidth,
    copy,
    0.0,
    _seconds_per_operation(),
    "measured on this machine, per second of a core",
  )


def seconds(function: Callable, *args: jax.Array) -> float:
  """Processor time of a call: the median of some series of calls."""
  compiled = jax.jit(function).lower(*args).compile()
  jax.block_until_ready(compiled(*args))
  return statistics.median(_series(compiled, *args) for _ in range(5))


def _series(compiled: Callable, *args: jax.Array) -> float:
  # The clock of a process is behind by what its other threads are doing, which
  # must be little of what is measured.
  calls, begin, spent = 0, time.process_time(), 0.0
  while spent < _SECONDS:
    jax.block_until_ready(compiled(*args))
    calls, spent = calls + 1, time.process_time() - begin
  return spent / calls


def _seconds_per_operation() -> float:
  """Of operations that do next to nothing."""

  def chain(x: jax.Array) -> jax.Array:
    for _ in range(_CHAIN):
      x = jnp.roll(jnp.sort(x), 1)
    return x

  return seconds(chain, jnp.ones(8)) / _CHAIN / 2


def _gelu(x: jax.Array) -> jax.Array:
  return 0.5 * x * (1 + jax.lax.erf(x * 2**-0.5))


def _layer_norm(x: jax.Array) -> jax.Array:
  x = x - x.mean(axis=-1, keepdims=True)
  return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)
