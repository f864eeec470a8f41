"""Tests of blip_jax, and what all of them need before jax is imported."""

# Most programs of tests run a few times at most: they are compiled with little
# optimisation, in the processes that tests start too. The emitters of fusions
# take as long as the rest of the compiler.
QUICK_COMPILER_OPTIONS = {
  "xla_backend_optimization_level": 0,
  "xla_cpu_use_fusion_emitters": False,
}
QUICK_TO_COMPILE = " ".join(
  f"--{name}={int(value)}" for name, value in QUICK_COMPILER_OPTIONS.items()
)
