"""The best parameters of a run so far, by the metrics of its evaluators."""

import logging
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from blip_jax.runtime import (
  digests,
  files,
  processes,
  remote_steps,
  saved_items,
  snapshot,
)

FOLDER = "best"
log = logging.getLogger(__name__)


class Best:
  """Keeps them in `WORKDIR/best/<step>/`, which `blip_jax.load` can open.

  The score decides, at whatever step it was reached: a run that went back to a
  checkpoint may score better at an earlier step, or at the same one again. A
  new checkpoint is complete before the old one is deleted.  A run that is
  resumed compares with the best score so far.

  Args:
    workdir: the run's folder.
    metrics: names as `split/metric`; the highest sum wins, the earlier of
      equal ones. Empty: nothing is kept.
    model: companion files of the parameters, name -> text.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    metrics: Sequence[str],
    model: Mapping[str, str] = types.MappingProxyType({}),
  ):
    self._metrics = metrics
    self._model = model
    self._folder = epath.Path(files.absolute(workdir)) / FOLDER

  def update(
    self, step: int, params: Any, results: Mapping[str, float]
  ) -> bool:
    """Keeps the parameters if they scored better than all before.

    Args:
      step: number of updates so far.
      params: as in the train state.
      results: of all evaluators.

    Raises:
      ValueError: a metric is not among the results.
    """
    if not self._metrics:
      return False
    missing = [name for name in self._metrics if name not in results]
    if missing:
      raise ValueError(
        f"config.evals.best: no evaluator reports {', '.join(missing)}; "
        f"available: {', '.join(sorted(results))}"
      )
    score = sum(results[name] for name in self._metrics)
    if not score > self._score():
      return False
    items = {
      "params": params,
      "model": saved_items.FilesItem(self._model),
      "meta": snapshot.meta(step, score=score, results=dict(results)),
    }
    problem = ""
    try:
      self._replace(step, items)
    # Of Orbax and TensorStore, many types of errors; the run goes on.
    except Exception as error:
      problem = files.one_line(str(error))[:300] or type(error).__name__
    if processes.any_says(bool(problem)):
      log.warning("The best so far, step %d, is not kept: %s", step, problem)
      return False
    names = " + ".join(self._metrics)
    log.info("Best so far: %s = %.4g, at step %d", names, score, step)
    return True

  def _replace(self, step: int, items: Mapping[str, Any]) -> None:
    """Writes a checkpoint, which then takes the place of all others."""
    if files.is_remote(self._folder):
      return self._replace_remote(step, items)
    new = self._folder / f".{step}.tmp"
    if jax.process_index() == 0:
      self._tidy()
    ocp.save_checkpointables(new, dict(items))
    if jax.process_index() == 0:
      digests.write(new)
      digests.complete(new)
      old = [self._folder / str(number) for number in self._steps()]
      # Between these renames only what is replaced has a name, and a process
      # that finds nothing else uses that.
      for folder in old:
        files.rename(folder, f"{folder}{snapshot.REPLACED}")
      files.rename(new, self._folder / str(step))
      snapshot.forget(self._folder / str(step))
      for folder in old:
        files.remove_folder(f"{folder}{snapshot.REPLACED}")

  def _replace_remote(self, step: int, items: Mapping[str, Any]) -> None:
    new = remote_steps.new_folder()
    ocp.save_checkpointables(new, dict(items))
    digests.write(new)
    digests.complete(new)
    remote_steps.publish(new, self._folder / str(step))
    remote_steps.remove_others(self._folder, lambda each: each == step)
    files.remove_folder(new)

  def _tidy(self) -> None:
    """Removes what a killed process left, but for the best so far."""
    files.make_folder(self._folder)
    found = files.list_folder(self._folder)
    for name in found:
      if name.endswith(snapshot.REPLACED) and not self._steps():
        name_of_step = name.removesuffix(snapshot.REPLACED)
        files.rename(self._folder / name, self._folder / name_of_step)
      elif name.endswith((snapshot.REPLACED, ".tmp", "-checkpoint-tmp")):
        files.remove_folder(self._folder / name)

  def _steps(self) -> list[int]:
    return snapshot.steps(self._folder)

  def _score(self) -> float:
    """The score of what is kept; lower than any if there is nothing sound."""
    if not files.list_folder(self._folder):
      return float("-inf")
    try:
      if files.is_remote(self._folder):
        newest = max(self._steps(), default=0)
        meta = self._folder / str(newest) / "meta" / "meta.json"
      else:
        meta = snapshot.find(self._folder) / "meta" / "meta.json"
      return float(files.read_json(meta)["score"])
    except (OSError, ValueError, LookupError, TypeError) as error:
      log.warning("There is no best score so far: %s", error)
      return float("-inf")
