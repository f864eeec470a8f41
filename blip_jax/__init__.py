"""BLIP in JAX: vision-language pre-training that cleans its own data."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from blip_jax.inference.matching import HiddenStates, Match
  from blip_jax.inference.model import Caption, Model, load

__version__ = "0.1.0"
__all__ = ["Caption", "HiddenStates", "Match", "Model", "__version__", "load"]

# Name -> module. Imported when first used: processes that only load data import
# this package too, and need neither JAX nor a second of everybody's time.
_LAZY = {
  "Caption": "blip_jax.inference.model",
  "HiddenStates": "blip_jax.inference.matching",
  "Match": "blip_jax.inference.matching",
  "Model": "blip_jax.inference.model",
  "load": "blip_jax.inference.model",
}


def __getattr__(name: str) -> object:
  if name not in _LAZY:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  import importlib

  value = getattr(importlib.import_module(_LAZY[name]), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
