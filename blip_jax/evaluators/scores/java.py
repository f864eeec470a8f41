"""METEOR and SPICE, by the official programs where these are installed.

They are not written anew: METEOR rests on its table of paraphrases, SPICE on a
parser of English. pycocoevalcap has the programs, and starts them.
"""

import importlib
import importlib.util
import shutil
import urllib.error
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float


def check(metrics: Iterable[str]) -> None:
  """Refuses metrics that are unknown or cannot be computed here.

  Raises:
    ValueError: with what is missing, and how to get it.
  """
  for name in metrics:
    if name not in METRICS:
      raise ValueError(f"{name!r} is no metric of {sorted(METRICS)}.")
    if importlib.util.find_spec("pycocoevalcap") is None:
      raise ValueError(
        f"{name} needs pycocoevalcap, which is not installed: pip install"
        " 'blip_jax[coco]', or go without this metric."
      )
    if shutil.which("java") is None:
      raise ValueError(
        f"{name} needs Java, and there is no `java` on the PATH: install a"
        " runtime (OpenJDK 8 or later), or go without this metric."
      )


def meteor(
  candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, Float[np.ndarray, "N"]]:
  """METEOR (Denkowski and Lavie, 2014) of all captions, and of each.

  Args:
    candidates: a caption for each image, as `ptb.tokenize` leaves it.
    references: the right captions of each image, likewise; at least one.
  """
  total, each = _run("meteor.meteor", "Meteor", candidates, references)
  return float(total), np.array(each, float)


def spice(
  candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, Float[np.ndarray, "N"]]:
  """Mean SPICE (Anderson et al., 2016), and that of each caption.

  Args:
    candidates: a caption for each image, as `ptb.tokenize` leaves it.
    references: the right captions of each image, likewise; at least one.

  Raises:
    ValueError: if the parser cannot be had, which the first run downloads.
  """
  try:
    total, each = _run("spice.spice", "Spice", candidates, references)
  except urllib.error.URLError as error:
    raise ValueError(
      f"SPICE downloads a parser on its first run, and cannot: {error.reason}."
      " Run it once where the network can be reached, or go without."
    ) from error
  return float(total), np.array([parts["All"]["f"] for parts in each], float)


def _run(
  module: str,
  scorer: str,
  candidates: Sequence[str],
  references: Sequence[Sequence[str]],
):
  module = importlib.import_module(f"pycocoevalcap.{module}")
  return getattr(module, scorer)().compute_score(
    {i: list(texts) for i, texts in enumerate(references)},
    {i: [text] for i, text in enumerate(candidates)},
  )


METRICS = {"METEOR": meteor, "SPICE": spice}
