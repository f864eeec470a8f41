"""What accelerators can do, by their makers' data sheets.

The one place for such numbers. Peaks are dense, of one chip or GPU; bandwidths
of links are of one direction, the sum over the links of a chip.
"""

import dataclasses

_TPU_DOCS = "https://docs.cloud.google.com/tpu/docs"
_NVIDIA = "https://www.nvidia.com/en-us/data-center"
GIGA = 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
  """A kind of device.

  Attributes:
    kinds: the names that JAX has for it.
    platform: "tpu", "gpu" or "cpu".
    tflops: 10^12 FLOPs a second of products in bfloat16.
    memory: bytes that the device has.
    usable: share of them that a job of JAX gets.
    bandwidth: bytes a second of its memory.
    link: bytes a second to other devices of its slice or host.
    network: bytes a second to other hosts; 0 if all are linked.
    per_op: seconds that pass between two operations.
    source: where the numbers are from.
  """

  kinds: tuple[str, ...]
  platform: str
  tflops: float
  memory: int
  usable: float
  bandwidth: float
  link: float
  network: float
  per_op: float
  source: str


def _tpu(
  name: str,
  kinds: tuple[str, ...],
  tflops: float,
  memory: int,
  bandwidth: int,
  link: int,
) -> Chip:
  return Chip(
    kinds,
    "tpu",
    tflops,
    memory * 2**30,
    # The compiler for v5e says that a program may use 15.75 GiB of its 16.
    15.75 / 16,
    bandwidth * GIGA,
    link * GIGA,
    0.0,
    1e-6,
    f"https://docs.cloud.google.com/tpu/docs/{name}",
  )


def _gpu(
  kinds: tuple[str, ...],
  tflops: float,
  memory: int,
  bandwidth: int,
  link: int,
  network: int,
  name: str,
) -> Chip:
  return Chip(
    kinds,
    "gpu",
    tflops,
    memory,
    # XLA_PYTHON_CLIENT_MEM_FRACTION is 0.75 unless it is set.
    0.75,
    bandwidth * GIGA,
    link * GIGA,
    network * GIGA,
    3e-6,
    f"https://www.nvidia.com/en-us/data-center/{name}",
  )


# Links of TPUs: half of the 400 GB/s (v5e) and 800 GB/s (v6e) of both
# directions, and the 4,800 (v5p) and 2,400 Gbit/s (v4). Links of GPUs: half of
# NVLink's 900 (A100: 600) GB/s of both directions. Their network: an adapter of
# 400 (A100: 200) Gbit/s for each GPU, as DGX systems have.
CHIPS = {
  "v4": _tpu("v4", ("TPU v4",), 275.0, 32, 1228, 300),
  "v5e": _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 197.0, 16, 819, 200),
  "v5p": _tpu("v5p", ("TPU v5", "TPU v5p"), 459.0, 95, 2765, 600),
  "v6e": _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 918.0, 32, 1640, 400),
  "a100-40gb": _gpu(
    ("NVIDIA A100-SXM4-40GB",), 312.0, 40 * 2**30, 1555, 300, 25, "a100"
  ),
  "a100": _gpu(
    ("NVIDIA A100-SXM4-80GB",), 312.0, 80 * 2**30, 2039, 300, 25, "a100"
  ),
  "h100": _gpu(
    ("NVIDIA H100 80GB HBM3",), 989.5, 84_929_347_584, 3350, 450, 50, "h100"
  ),
  "h200": _gpu(("NVIDIA H200",), 989.5, 141 * 10**9, 4800, 450, 50, "h200"),
}


def of_kind(kind: str) -> Chip | None:
  """The chip that JAX calls by a name."""
  return next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
