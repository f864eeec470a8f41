"""BLIP in JAX: vision-language pre-training that cleans its own data."""

__version__ = "0.1.0"


def __getattr__(name: str):
  # Not imported before it is asked for: the processes that load data import
  # this package too, and need neither JAX nor a second of everybody's time.
  if name == "load":
    from blip_jax.inference import load

    return load
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
