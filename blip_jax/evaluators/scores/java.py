"""METEOR and SPICE, computed by the official Java programs if installed.

They are not reimplemented: METEOR needs its table of paraphrases, SPICE a
parser of English. pycocoevalcap contains the programs and starts them.
"""

import importlib
import importlib.util
import shutil
import urllib.error
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float


def check(metrics: Iterable[str]) -> None:
  """Checks that metrics are known and can be computed.

  Raises:
    ValueError: says what is missing and how to get it.
  """
  for name in metrics:
    if name not in METRICS:
      raise ValueError(f"{name!r}: expected one of {sorted(METRICS)}.")
    if importlib.util.find_spec("pycocoevalcap") is None:
      raise ValueError(
        f"{name} needs pycocoevalcap, which is not installed: pip install"
        " 'blip_jax[coco]', or leave this metric out."
      )
    if shutil.which("java") is None:
      raise ValueError(
        f"{name} needs Java, and there is no `java` on the PATH: install a"
        " runtime (OpenJDK 8 or later), or leave this metric out."
      )


def meteor(
  candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, Float[np.ndarray, "N"]]:
  """Returns METEOR (Denkowski and Lavie, 2014) of the corpus and each caption.

  Args:
    candidates: a caption for each image, tokenised by `ptb.tokenize`.
    references: reference captions of each image, likewise; at least one.
  """
  total, each = _run("meteor.meteor", "Meteor", candidates, references)
  return float(total), np.array(each, float)


def spice(
  candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, Float[np.ndarray, "N"]]:
  """Returns the mean SPICE (Anderson et al., 2016), and that of each caption.

  Args:
    candidates: a caption for each image, tokenised by `ptb.tokenize`.
    references: reference captions of each image, likewise; at least one.

  Raises:
    ValueError: the parser, which the first run downloads, is not available.
  """
  try:
    total, each = _run("spice.spice", "Spice", candidates, references)
  except urllib.error.URLError as error:
    raise ValueError(
      "SPICE downloads a parser on its first run, which failed:"
      f" {error.reason}. Run it once with network access, or leave this"
      " metric out."
    ) from error
  return float(total), np.array([parts["All"]["f"] for parts in each], float)


def _run(
  module: str,
  scorer: str,
  candidates: Sequence[str],
  references: Sequence[Sequence[str]],
) -> tuple[Any, Any]:
  imported = importlib.import_module(f"pycocoevalcap.{module}")
  return getattr(imported, scorer)().compute_score(
    {i: list(texts) for i, texts in enumerate(references)},
    {i: [text] for i, text in enumerate(candidates)},
  )


METRICS = {"METEOR": meteor, "SPICE": spice}
