"""Tests of blip_jax, and what all of them need before jax is imported."""

import importlib.metadata

# Most programs of tests run a few times at most: they are compiled with little
# optimisation, in the processes that tests start too.
QUICK_COMPILER_OPTIONS = {
  "xla_backend_optimization_level": 0,
  # Otherwise each program is split for more threads than there are cores.
  "xla_cpu_parallel_codegen_split_count": 1,
}
# The emitters of fusions take as long as the rest of the compiler. Later
# versions cannot do without, and end a process that names the flag.
if importlib.metadata.version("jaxlib") < "0.11":
  QUICK_COMPILER_OPTIONS["xla_cpu_use_fusion_emitters"] = False
QUICK_TO_COMPILE = " ".join(
  f"--{name}={int(value)}" for name, value in QUICK_COMPILER_OPTIONS.items()
)
