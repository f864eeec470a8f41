"""Decides where a job starts, and loads the state that it starts with."""

import dataclasses
import functools
import logging
import os
import pathlib
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from blip_jax.runtime import (
  best,
  checkpoint,
  digests,
  files,
  remote_steps,
  saved_arrays,
  saved_items,
  sharding,
  snapshot,
  train_state,
)

log = logging.getLogger(__name__)


def falls_back(job: Callable[..., Any]) -> Callable[..., Any]:
  """Makes a job start again if it finds that its checkpoint is damaged.

  The next time it finds the newest sound step; see `snapshot.find`.
  """

  @functools.wraps(job)
  def repeated(*args, **kwargs):
    while True:
      try:
        return job(*args, **kwargs)
      except digests.Damaged as damage:
        snapshot.remember(damage)

  return repeated


def verify(
  origin: "Origin", items: Sequence[str] | None = None
) -> digests.Verification:
  """Starts to verify the step of a run that a job starts from.

  Weights are verified when they are opened.

  Args:
    origin: from `origin`.
    items: what the job reads; everything by default.
  """
  is_step = origin.kind in ("resumed", "restored", "best")
  return digests.Verification(origin.source if is_step else "", items)


@typing.runtime_checkable
class Item(typing.Protocol):
  """Arrays by path, which can be loaded one by one."""

  @property
  def stored(self) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes, by path."""
    ...

  def load(self, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """The arrays of some paths, with the shardings that are asked for."""
    ...


class Weights(Item, typing.Protocol):
  """Parameters, with momentum encoders and queues if there are any.

  `str()` of it names their origin, for the log.
  """

  @property
  def momentum(self) -> Item | None: ...


@dataclasses.dataclass(frozen=True)
class Origin:
  """Where a job takes its parameters from; see `origin`.

  Attributes:
    kind: resumed, restored, best, weights or scratch.
    source: the folder of one step; for weights, what names them; "" for
      scratch.
  """

  kind: str
  source: str

  @property
  def is_of_workdir(self) -> bool:
    """Whether the run in the job's own workdir is resumed, or evaluated."""
    return self.kind in ("resumed", "best")


def origin(config: Any, workdir: str | os.PathLike) -> Origin:
  """Decides where any job starts. The first of these that applies:

  1. RESUME. This workdir has a complete checkpoint: continue exactly there, and
     read nothing else, whatever the config names. So one command both starts a
     run and resumes it after a preemption, and evaluates what it trained. A job
     that evaluates may ask for another checkpoint of the workdir with
     `config.evals.checkpoint`: "best", or a step.
  2. RESTORE. `config.init.restore` names another run (its workdir, or one of
     its checkpoints): take its whole state, step and data position included.
  3. INIT FROM. `config.init.weights` names weights: take the parameters only,
     at step 0, with a new optimiser and a momentum encoder that starts equal to
     them; with `config.init.momentum_state`, also the momentum encoder and
     queues of the weights, where they have any. Names must agree both ways.
     Exceptions are regular expressions that match complete paths: of
     `config.init.allow_missing`, which stay fresh, and of
     `config.init.allow_unexpected`, which are dropped.
  4. SCRATCH.

  Args:
    config: of the job; an empty value in `config.init` means unset.
    workdir: the run's folder.

  Raises:
    ValueError: the checkpoint to evaluate does not exist, or `config.init`
      names both a run and weights.
  """
  if config.init.restore and config.init.weights:
    raise ValueError(
      "config.init.restore and config.init.weights exclude each other: the "
      "first takes the full state of a run, the second only parameters. Unset "
      "one of them, for example with --config.init.weights="
    )
  asked = config.evals.checkpoint if config.job == "evaluate" else "latest"
  if asked == "best":
    return Origin("best", _kept(files.as_path(workdir) / best.FOLDER, asked))
  run = files.as_path(workdir) / snapshot.FOLDER
  if asked != "latest":
    return Origin("resumed", _kept(run / asked, asked))
  if snapshot.steps(run):
    return Origin("resumed", str(snapshot.find(workdir)))
  if config.init.restore:
    return Origin("restored", str(snapshot.find(config.init.restore)))
  if config.init.weights:
    return Origin("weights", config.init.weights)
  return Origin("scratch", "")


def _kept(folder: pathlib.PurePath, asked: str) -> str:
  try:
    return str(snapshot.find(folder))
  except ValueError as error:
    raise ValueError(f"config.evals.checkpoint={asked}: {error}") from error


def initialise(
  origin: Origin,
  config: Any,
  open_weights: Callable[[str], Weights],
  abstract: train_state.TrainState,
  make_state: Callable[[Any], train_state.TrainState],
  loader: checkpoint.Loader | None = None,
) -> tuple[train_state.TrainState, str]:
  """Makes the state that a job starts with.

  Args:
    origin: from `origin`.
    config: `config.init`.
    open_weights: opens weights by name or path.
    abstract: shapes and shardings of the state, from `train_state.abstract`; an
      item that is None here is not read.
    make_state: `params | None -> state`, from `train_state.create`.
    loader: set to the saved position of a run, if given.

  Returns:
    The state, and its origin in words, for the log.

  Raises:
    ValueError: the source is no checkpoint, is damaged, or does not fit.
  """
  if origin.kind in ("resumed", "restored"):
    folder = epath.Path(origin.source)
    try:
      state = load_state(folder, abstract, loader)
    except ValueError:
      # Damage explains more than what it led to.
      digests.check(folder)
      raise
    return state, f"{origin.kind} {remote_steps.source(origin.source)}"
  if origin.kind == "scratch":
    return make_state(None), "from scratch"
  try:
    weights = open_weights(origin.source)
  except ValueError as error:
    raise ValueError(f"config.init.weights: {error}") from error
  params, report = load_weights(config, weights, abstract, make_state)
  state = make_state(params)
  if config.momentum_state and state.momentum is not None and weights.momentum:
    momentum = load_momentum(weights.momentum, abstract, state)
    state = state.replace(momentum=momentum)
  return state, f"weights of {weights}\n{report}".rstrip()


def load_state(
  folder: epath.Path,
  abstract: train_state.TrainState,
  loader: checkpoint.Loader | None = None,
) -> train_state.TrainState:
  """Loads the full state of a run, onto any mesh; bit for bit what was saved.

  Args:
    folder: the folder of one step.
    abstract: shapes and shardings; an item that is None here is not read.
    loader: set to the saved position, if given.

  Raises:
    ValueError: the checkpoint is damaged, or belongs to another model,
      optimiser, or number of processes.
  """
  items = {
    name: getattr(abstract, name)
    for name in saved_items.ARRAYS
    if getattr(abstract, name) is not None
  }
  for name, tree in items.items():
    _check_same(folder, name, tree)
  if loader is not None:
    loader.set_state(_load_position(folder))
  meta = saved_items.load(
    folder, "meta", saved_items.JsonItem("meta.json")
  ).value
  arrays = {name: saved_items.load(folder, name, items[name]) for name in items}
  return train_state.TrainState(
    step=jax.device_put(np.int32(meta["step"]), abstract.step.sharding),
    **{"momentum": None, "opt_state": None, **arrays},
  )


def _load_position(folder: epath.Path) -> dict[str, Any]:
  """The positions of all processes that saved a step, in their data."""
  names = {path.name for path in (folder / "data").glob("process_*")}
  if not names:
    raise ValueError(f"{folder}/data holds no position of any process")
  count = int(min(names).removesuffix(".json").rpartition("-")[2])
  expected = [saved_items.process_file(index, count) for index in range(count)]
  if missing := [name for name in expected if name not in names]:
    raise ValueError(f"{folder}/data lacks {', '.join(missing)}")
  if count != jax.process_count():
    log.info("Saved by %d processes, resumed by %d", count, jax.process_count())
  items = [saved_items.JsonItem(name) for name in expected]
  return {
    "processes": [
      saved_items.load(folder, "data", item).value for item in items
    ]
  }


def _check_same(folder: epath.Path, name: str, tree: Any) -> None:
  """Refuses a state of other shapes than this config has."""
  saved = saved_arrays.by_path(saved_arrays.stored(folder, name))
  if any(re.search(r"(^|/)(block|layer)_\d+/", path) for path in saved):
    raise ValueError(
      f"{folder} was saved before 0.1.0, when each layer had its own arrays. "
      "Its weights can be used, but the run cannot go on: give another "
      f"--workdir, and --config.init.weights={folder.parent.parent}"
    )
  lines = saved_arrays.differences(saved, saved_arrays.by_path(tree))
  if lines:
    raise ValueError(
      f"{folder} was saved by another config; its {name} differ ( - only this "
      "config has it, + only the checkpoint has it):\n"
      f"{saved_arrays.first_lines(lines)}\n"
      f"To train this config, use another --workdir"
    )


def load_weights(
  config: Any,
  weights: Weights,
  abstract: train_state.TrainState,
  make_state: Callable[[Any], train_state.TrainState],
) -> tuple[Any, str]:
  """Takes parameters by name; nothing is left out silently.

  Args:
    config: `config.init`.
    weights: an opened checkpoint.
    abstract: shapes and shardings of the state to fill.
    make_state: creates parameters that may be missing.

  Returns:
    The parameters, and a report of names that were missing or unexpected.

  Raises:
    ValueError: names do not agree.
  """
  saved, expected = weights.stored, saved_arrays.by_path(abstract.params)
  refused = saved_arrays.differences(
    _without(saved, config.allow_unexpected, keep=expected),
    _without(expected, config.allow_missing, keep=saved),
  )
  if refused:
    raise ValueError(
      f"the parameters of {weights} do not fit ( - this model needs it, + only "
      "the checkpoint has it):\n"
      f"{saved_arrays.first_lines(refused)}\n"
      f"If that is intended, name them with config.init.allow_missing ( - ) or "
      f"config.init.allow_unexpected ( + )"
    )
  # Only what is used is read: a dropped tower costs neither time nor memory.
  params = weights.load({p: leaf for p, leaf in expected.items() if p in saved})
  if len(params) < len(expected):
    params = {**saved_arrays.by_path(make_state(None).params), **params}
  report = "\n".join(saved_arrays.differences(saved, expected))
  return saved_arrays.nested(params), report


def load_momentum(
  saved: Item, abstract: train_state.TrainState, state: train_state.TrainState
) -> Any:
  """Momentum encoders and queues; queues of another size stay fresh."""
  expected = saved_arrays.by_path(abstract.momentum)
  same = {
    path
    for path, leaf in expected.items()
    if path in saved.stored and saved.stored[path].shape == leaf.shape
  }
  queues = {path for path in expected if not path.startswith("params_m/")}
  taken = same if queues <= same else same - queues
  loaded = saved.load({path: expected[path] for path in sorted(taken)})
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: loaded.get(sharding.path_str(path), leaf), state.momentum
  )


def _without(
  flat: Mapping[str, Any], patterns: Sequence[str], keep: Mapping[str, Any]
) -> dict[str, Any]:
  return {
    path: leaf
    for path, leaf in flat.items()
    if path in keep or not any(re.fullmatch(p, path) for p in patterns)
  }
