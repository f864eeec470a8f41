"""Weights & Biases and trackio: experiment trackers, which get all metrics.

Each is its own library, from the extra `tracking`, and knows from its own
environment variables or log-in where metrics go.
"""

import hashlib
import importlib
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from blip_jax.runtime import files

NAMES = ("wandb", "trackio")
log = logging.getLogger(__name__)


class Tracker:
  """A run in a tracker; a run that is resumed goes on in it.

  Trackers cannot take back what was logged after the last checkpoint. So the
  step is a metric, and steps that were made twice have two values.

  Args:
    name: one of NAMES.
    workdir: the run's folder, whose name the run gets.
    config: of the run, which the tracker shows.

  Raises:
    ImportError: the library is not installed.
    ValueError: it does not begin.
  """

  def __init__(
    self, name: str, workdir: str | os.PathLike, config: Mapping[str, Any]
  ):
    try:
      self._library = importlib.import_module(name)
    except ImportError as error:
      raise ImportError(
        f"config.tracker={name} needs the extra [tracking]: "
        "pip install 'blip_jax[tracking]'"
      ) from error
    self._is_wandb = name == "wandb"
    address = files.absolute(workdir)
    run = {
      "project": os.environ.get(f"{name.upper()}_PROJECT", "blip_jax"),
      "name": pathlib.PurePath(address).name,
      "config": dict(config),
      "resume": "allow",
    }
    if self._is_wandb:
      # Names need not be unique there.
      run["id"] = hashlib.sha256(address.encode()).hexdigest()[:16]
    try:
      self._library.init(**run)
      if self._is_wandb:
        self._library.define_metric("*", step_metric="step")
    # Each has its own types of errors, for a network or a log-in that lacks.
    except Exception as error:
      raise ValueError(
        f"config.tracker={name}: {error}. Log in as its documentation says"
        + (", or set WANDB_MODE=offline" if self._is_wandb else "")
      ) from error
    log.info("Metrics also go to %s", name)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Sends the metrics of a step, in the background."""
    if self._is_wandb:
      self._library.log({"step": step, **metrics})
    else:
      self._library.log(dict(metrics), step=step)

  def close(self) -> None:
    """Waits until all is sent."""
    self._library.finish()
