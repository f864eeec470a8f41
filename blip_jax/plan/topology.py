"""Devices by the name of a topology, whether they are there or not.

v5e:16x16   v5p:4x4x4   v6e:8x8   a slice of TPUs, by the sides of its torus
h100:1x8    h200:4x8              hosts x GPUs
cpu:4                             this machine's processor as devices
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from blip_jax.plan import chips, processor
from blip_jax.runtime.command import UsageError

# Sides of a torus by kind of TPU.
_TPU_SIDES = {"v5e": 2, "v5p": 3, "v6e": 2}
_GPUS = ("h100", "h200")
NAMES = "v5e:16x16, v5p:4x4x4, v6e:8x8, h100:1x8, h200:4x8 or cpu:4"

# What XLA has to know of a GPU to compile for it; both are of the same
# architecture. Sizes are in bytes, rates in bytes a second.
_GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{kind}"
"""
# Nothing can be tried out on a GPU that is not there; without it, the compiler
# of jax 0.10 fails at kernels that it writes in Triton.
_GPU_OPTIONS = {
  "xla_gpu_autotune_level": 0,
  "xla_gpu_enable_triton_gemm": False,
}
_TPU_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
  # Several plans at once; no TPU is used.
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices to plan for.

  Attributes:
    name: as the user gave it.
    chip: what one device can do.
    devices: JAX's descriptions of them.
    per_host: devices that a group has before it needs the network.
    compiler_options: for `Lowered.compile`.
  """

  name: str
  chip: chips.Chip
  devices: list[Any]
  per_host: int
  compiler_options: dict[str, Any] = dataclasses.field(default_factory=dict)


def parse(name: str) -> Topology:
  """The topology of a name.

  Call it before JAX is used: for "cpu:4" it makes the devices.

  Raises:
    UsageError: there is no such topology.
    ImportError: the extra is missing that compiles for it.
  """
  kind, _, text = name.partition(":")
  known = (*_TPU_SIDES, *_GPUS, "cpu")
  if kind not in known or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
    raise UsageError(
      f"--topology: expected one such as {NAMES}; found {name!r}"
    )
  sides = [int(side) for side in text.split("x")]
  if kind in _TPU_SIDES:
    return _tpu(name, kind, sides)
  return _gpu(name, kind, sides) if kind in _GPUS else _cpu(name, sides)


def _tpu(name: str, kind: str, sides: list[int]) -> Topology:
  _need("libtpu", name, "tpu-aot")
  if len(sides) != _TPU_SIDES[kind]:
    raise UsageError(
      f"--topology {name}: a slice of {kind} has {_TPU_SIDES[kind]} sides, "
      f"found {len(sides)}"
    )
  for key, value in _TPU_ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  # One chip is not a host of four, which the library expects.
  bounds = {"chips_per_host_bounds": (1, 1, 1)} if max(sides) == 1 else {}
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=name, **bounds
    )
  except jax.errors.JaxRuntimeError as error:
    raise UsageError(f"--topology {name}: {_first_line(error)}") from error
  return Topology(name, chips.CHIPS[kind], found.devices, math.prod(sides))


def _gpu(name: str, kind: str, sides: list[int]) -> Topology:
  _need("jax_cuda12_plugin", name, "gpu-aot")
  if len(sides) != 2:
    raise UsageError(
      f"--topology {name}: expected hosts x GPUs, such as {kind}:4x8"
    )
  chip = chips.CHIPS[kind]
  target = _GPU_TARGET.format(
    bandwidth=int(chip.bandwidth), memory=chip.memory, kind=chip.kinds[0]
  )
  hosts, per_host = sides
  found = topologies.get_topology_desc(
    platform="cuda",
    topology_name=kind,
    target_config=target,
    topology=f"1x{hosts}x{per_host}",
  )
  return Topology(name, chip, found.devices, per_host, _GPU_OPTIONS)


def _cpu(name: str, sides: list[int]) -> Topology:
  if len(sides) != 1:
    raise UsageError(f"--topology {name}: expected a number of devices")
  (number,) = sides
  try:
    jax.config.update("jax_num_cpu_devices", number)
  except RuntimeError:  # JAX has its devices already
    if len(jax.devices("cpu")) < number:
      raise
  devices = jax.devices("cpu")[:number]
  return Topology(name, processor.measure(number), devices, number)


def _need(module: str, name: str, extra: str) -> None:
  if importlib.util.find_spec(module) is None:
    raise ImportError(
      f"--topology {name} needs a compiler that is not installed: "
      f"pip install 'blip_jax[{extra}]'"
    )


def _first_line(error: Exception) -> str:
  return str(error).partition("\n")[0]
