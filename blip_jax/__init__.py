"""BLIP in JAX: vision-language pre-training that cleans its own data.

  import blip_jax

  model = blip_jax.load("Salesforce/blip-image-captioning-base")
  print(model.caption("dog.jpg")[0].text)

`load` opens a released checkpoint, one of Hugging Face, or the workdir of a
training run, and returns a `Model`, which captions images, answers questions
about them, compares two of them with a statement, chooses answers in a dialog,
scores image-text pairs and embeds both. Training, evaluation and CapFilt are
jobs of `python -m blip_jax.main`.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from blip_jax.inference.answering import Answer
  from blip_jax.inference.captioning import Caption
  from blip_jax.inference.choosing import Choice, Dialog
  from blip_jax.inference.comparing import Comparison
  from blip_jax.inference.explanation import Explanation
  from blip_jax.inference.images import Image, ImageReader
  from blip_jax.inference.loading import load
  from blip_jax.inference.matching import HiddenStates, Match
  from blip_jax.inference.model import Model
  from blip_jax.inference.pipelines import pipeline

__version__ = "0.1.0"
__all__ = [
  "Answer",
  "Caption",
  "Choice",
  "Comparison",
  "Dialog",
  "Explanation",
  "HiddenStates",
  "Image",
  "ImageReader",
  "Match",
  "Model",
  "__version__",
  "load",
  "pipeline",
]

# Name -> module, imported when first used: processes that only load data import
# this package too, and need neither JAX nor a second to start.
_MODULES = {
  "Answer": "blip_jax.inference.answering",
  "Caption": "blip_jax.inference.captioning",
  "Choice": "blip_jax.inference.choosing",
  "Comparison": "blip_jax.inference.comparing",
  "Dialog": "blip_jax.inference.choosing",
  "Explanation": "blip_jax.inference.explanation",
  "HiddenStates": "blip_jax.inference.matching",
  "Image": "blip_jax.inference.images",
  "ImageReader": "blip_jax.inference.images",
  "Match": "blip_jax.inference.matching",
  "Model": "blip_jax.inference.model",
  "load": "blip_jax.inference.loading",
  "pipeline": "blip_jax.inference.pipelines",
}


def __getattr__(name: str) -> object:
  if name not in _MODULES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  value = getattr(importlib.import_module(_MODULES[name]), name)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
