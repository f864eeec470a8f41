"""The best parameters of a run so far, by the metrics of its evaluators."""

import json
import logging
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from orbax.checkpoint import v1 as ocp

from blip_jax.runtime import snapshot

FOLDER = "best"
log = logging.getLogger(__name__)


class Best:
  """Keeps them in `WORKDIR/best/<step>/`, which `blip_jax.load` can open.

  A new checkpoint is complete before the old one is deleted.  A run that is
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
    self._folder = epath.Path(workdir).absolute() / FOLDER

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
      "model": snapshot.FilesItem(self._model),
      "meta": snapshot.JsonItem(
        "meta.json", {"step": step, "score": score, "results": dict(results)}
      ),
    }
    # Orbax's policies do not match its own protocol, says a type checker.
    latest: Any = ocp.training.preservation_policies.LatestN(1)
    with ocp.training.Checkpointer(
      self._folder, preservation_policy=latest, cleanup_tmp_directories=True
    ) as checkpointer:
      checkpointer.save_checkpointables(step, items)
    names = " + ".join(self._metrics)
    log.info("Best so far: %s = %.4g, at step %d", names, score, step)
    return True

  def _score(self) -> float:
    """The score of what is kept."""
    if not snapshot.steps(self._folder):
      return float("-inf")
    meta = snapshot.find(self._folder) / "meta" / "meta.json"
    return json.loads(meta.read_text())["score"]
