"""Saving runs, and deciding where a run starts.

Orbax writes `WORKDIR/checkpoints/<step>/` in the background; what is in such a
folder, and how to read it, is in `snapshot.py`.
"""

import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from blip_jax.runtime import sharding, snapshot, train_state


@typing.runtime_checkable
class Loader(typing.Protocol):
  """What a checkpoint needs of the input pipeline."""

  def get_state(self) -> dict[str, Any]: ...
  def set_state(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
  """The checkpoints of one run.

  Args:
    workdir: the run's folder.
    every_steps: how often `save` saves.
    keep: how many of the latest are kept.
    keep_every_steps: steps at multiples of this are kept for ever; 0 for none.
    model: files that say what the parameters are, name -> text.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    every_steps: int,
    keep: int = 2,
    keep_every_steps: int = 0,
    model: Mapping[str, str] = types.MappingProxyType({}),
  ):
    if every_steps < 1 or keep < 1:
      raise ValueError(
        "config.checkpoint.every_steps and config.checkpoint.keep must be at "
        f"least 1, found {every_steps} and {keep}"
      )
    self._model = model
    policies = ocp.training.preservation_policies
    kept = [policies.LatestN(keep)]
    if keep_every_steps:
      kept.append(policies.EveryNSteps(keep_every_steps))
    save_policies = ocp.training.save_decision_policies
    self._checkpointer = ocp.training.Checkpointer(
      epath.Path(workdir).absolute() / snapshot.FOLDER,
      save_decision_policy=save_policies.FixedIntervalPolicy(every_steps),
      preservation_policy=policies.AnyPreservationPolicy(kept),
      # What a killed process left half written; never a committed step.
      cleanup_tmp_directories=True,
    )

  @property
  def latest(self) -> epath.Path | None:
    """The folder of the last committed step."""
    latest = self._checkpointer.latest
    return epath.Path(latest.path) if latest else None

  def save(
    self,
    step: int,
    state: train_state.TrainState,
    loader: Loader,
    config: Mapping[str, Any],
    *,
    force: bool = False,
  ) -> bool:
    """Saves in the background if it is time to, or if `force`.

    Returns once the arrays are copied off the devices, so that the next step
    may donate them. A failure to write is raised by the next call, or `wait`.

    Args:
      step: `state.step` as the host knows it.
      state: the state after that many updates.
      loader: asked now for the position of the next batch.
      config: JSON-able, kept for people and for later jobs.
      force: save even off the interval. A step that is saved already stays.
    """
    latest = self._checkpointer.latest
    if latest and latest.step == step:
      return False
    if not force and not self._checkpointer.should_save(step):
      return False
    items = {
      "params": state.params,
      "opt_state": state.opt_state,
      "data": snapshot.JsonItem(snapshot.process_file(), loader.get_state()),
      "meta": snapshot.JsonItem("meta.json", {"step": step}),
      "config": snapshot.JsonItem("config.json", dict(config)),
      "model": snapshot.FilesItem(self._model),
    }
    if state.momentum is not None:
      items["momentum"] = state.momentum
    self._checkpointer.save_checkpointables_async(step, items, force=force)
    return True

  def wait(self) -> None:
    """Blocks until nothing is being written; raises what went wrong."""
    self._checkpointer.wait()

  def close(self) -> None:
    self._checkpointer.close()


@typing.runtime_checkable
class Item(typing.Protocol):
  """Arrays by path, of which some may be wanted."""

  stored: Mapping[str, jax.ShapeDtypeStruct]

  def load(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """The arrays of some paths, with the shardings that are asked for."""


class Weights(Item, typing.Protocol):
  """Parameters, and twin and queues if they have any.

  `str` of it says for the log where they are from.
  """

  momentum: Item | None


def initialise(
  config: Any,
  open_weights: Callable[[str], Weights],
  checkpoints: Checkpoints,
  abstract: train_state.TrainState,
  make_state: Callable[[Any], train_state.TrainState],
  loader: Loader,
) -> tuple[train_state.TrainState, str]:
  """Decides where a run starts. The first of these that applies, in this order:

  1. RESUME. This workdir has a committed checkpoint: continue it exactly, and
     read nothing else, whatever the config names. So one command both starts a
     run and continues it after a preemption.
  2. RESTORE. `config.restore` names another run (its workdir, or one of its
     checkpoints): take its whole state, step and data position included.
  3. INIT FROM. `config.weights` names weights: take the parameters only, at
     step 0, with a new optimiser and a momentum encoder that starts equal to
     them; with `config.momentum_state`, also the momentum encoder and queues of
     the weights, where they have any. Names must agree both ways. Exceptions
     are regular expressions that match complete paths: of
     `config.allow_missing`, which stay fresh, and of
     `config.allow_unexpected`, which are dropped.
  4. SCRATCH.

  Args:
    config: `config.init`, with the five keys above; empty means unset.
    open_weights: finds what `config.weights` names.
    checkpoints: of this workdir.
    abstract: shapes and shardings of the state, from `train_state.abstract`.
    make_state: `params | None -> state`, from `train_state.create`.
    loader: set to the saved position in 1 and 2.

  Returns:
    The state, and a sentence for the log that says where it came from.

  Raises:
    ValueError: a source that is no checkpoint, is damaged, or does not fit.
  """
  if config.restore and config.weights:
    raise ValueError(
      "config.init.restore and config.init.weights exclude each other: the "
      "first takes a whole run, the second its parameters"
    )
  if checkpoints.latest is not None:
    state = load_state(checkpoints.latest, abstract, loader)
    return state, f"resumed {checkpoints.latest}"
  if config.restore:
    folder = snapshot.find(config.restore)
    return load_state(folder, abstract, loader), f"restored {folder}"
  if config.weights:
    try:
      weights = open_weights(config.weights)
    except ValueError as error:
      raise ValueError(f"config.init.weights: {error}") from error
    params, report = load_weights(config, weights, abstract, make_state)
    state = make_state(params)
    if (
      config.momentum_state and state.momentum is not None and weights.momentum
    ):
      momentum = load_momentum(weights.momentum, abstract, state)
      state = state.replace(momentum=momentum)
    return state, f"weights of {weights}\n{report}".rstrip()
  return make_state(None), "from scratch"


def load_state(
  folder: epath.Path,
  abstract: train_state.TrainState,
  loader: Loader | None = None,
) -> train_state.TrainState:
  """Loads a whole run, onto any mesh; bit for bit what was saved.

  Args:
    folder: of one step.
    abstract: shapes and shardings; an item that is None here is not read.
    loader: set to the saved position, if given.

  Raises:
    ValueError: the checkpoint is damaged, or belongs to another model,
      optimiser, or number of processes.
  """
  wanted = {
    name: getattr(abstract, name)
    for name in snapshot.ARRAYS
    if getattr(abstract, name) is not None
  }
  for name, tree in wanted.items():
    _check_same(folder, name, tree)
  if loader is not None:
    loader.set_state(_load_position(folder))
  meta = snapshot.load(folder, "meta", snapshot.JsonItem("meta.json")).value
  arrays = {name: snapshot.load(folder, name, wanted[name]) for name in wanted}
  return train_state.TrainState(
    step=jax.device_put(np.int32(meta["step"]), abstract.step.sharding),
    **{"momentum": None, "opt_state": None, **arrays},
  )


def _load_position(folder: epath.Path) -> dict[str, Any]:
  data = snapshot.JsonItem(snapshot.process_file())
  if not (folder / "data" / data.filename).exists():
    found = sorted(p.name for p in (folder / "data").glob("process_*"))
    raise ValueError(
      f"{folder}/data has no {data.filename} but {found}: a run continues only "
      f"on as many processes as it was saved by. To start a new run from its "
      f"parameters, use another --workdir and config.init.weights"
    )
  return snapshot.load(folder, "data", data).value


def _check_same(folder: epath.Path, name: str, tree: Any) -> None:
  """Refuses a run that this config would not have made."""
  theirs = snapshot.by_path(snapshot.stored(folder, name))
  lines = snapshot.differences(theirs, snapshot.by_path(tree))
  if lines:
    raise ValueError(
      f"{folder} was saved by another config; its {name} differ ( - only this "
      "config has it, + only the checkpoint has it):\n"
      f"{snapshot.first_lines(lines)}\n"
      f"To train this config, use another --workdir"
    )


def load_weights(
  config: Any,
  weights: Weights,
  abstract: train_state.TrainState,
  make_state: Callable[[Any], train_state.TrainState],
) -> tuple[Any, str]:
  """Takes parameters by name; nothing is left out unsaid.

  Args:
    config: `config.init`.
    weights: an opened checkpoint.
    abstract: shapes and shardings of the state that they are for.
    make_state: makes what they lack and the config allows to be missing.

  Returns:
    The parameters, and what they lack or have too many.

  Raises:
    ValueError: names do not agree.
  """
  theirs, ours = weights.stored, snapshot.by_path(abstract.params)
  refused = snapshot.differences(
    _without(theirs, config.allow_unexpected, keep=ours),
    _without(ours, config.allow_missing, keep=theirs),
  )
  if refused:
    raise ValueError(
      f"the parameters of config.init.weights={config.weights} do not fit ( - "
      "this model needs it, + only the checkpoint has it):\n"
      f"{snapshot.first_lines(refused)}\n"
      f"If meant, name them with config.init.allow_missing ( - ) or "
      f"config.init.allow_unexpected ( + )"
    )
  # Only what is wanted is read: a dropped tower costs neither time nor memory.
  params = weights.load({p: leaf for p, leaf in ours.items() if p in theirs})
  if len(params) < len(ours):
    params = {**snapshot.by_path(make_state(None).params), **params}
  report = "\n".join(snapshot.differences(theirs, ours))
  return snapshot.nested(params), report


def load_momentum(
  theirs: Item, abstract: train_state.TrainState, state: train_state.TrainState
) -> Any:
  """A twin with its queues, which stay fresh if theirs are of another size."""
  ours = snapshot.by_path(abstract.momentum)
  same = {
    path
    for path, leaf in ours.items()
    if path in theirs.stored and theirs.stored[path].shape == leaf.shape
  }
  queues = {path for path in ours if not path.startswith("params_m/")}
  wanted = same if queues <= same else same - queues
  loaded = theirs.load({path: ours[path] for path in sorted(wanted)})
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
