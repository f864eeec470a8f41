"""Tests of blip_jax, and what all of them need before jax is imported."""

# Most programs of tests run a few times at most: they are compiled with little
# optimisation, in the processes that tests start too.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0"
