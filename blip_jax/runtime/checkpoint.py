"""Saves runs.

Orbax writes `WORKDIR/checkpoints/<step>/` in the background; what is in such a
folder, and how to read it, is in `snapshot.py`. For a workdir in an object
store, see `remote_steps.py`.
"""

import logging
import os
import time
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from blip_jax.runtime import (
  digests,
  files,
  processes,
  remote_steps,
  saved_items,
  snapshot,
  train_state,
)

log = logging.getLogger(__name__)

# Seconds until a step that has to be saved is tried again.
_PAUSES = (1.0, 4.0, 15.0)


@typing.runtime_checkable
class Loader(typing.Protocol):
  """What a checkpoint needs from the input pipeline."""

  def get_state(self) -> dict[str, Any]: ...
  def set_state(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
  """The checkpoints of one run.

  Every step has digests before it gets its name. Steps that are known to be
  damaged are renamed, so that the run can save them again.

  Args:
    workdir: the run's folder.
    every_steps: interval at which `save` saves.
    keep: number of latest checkpoints that are kept.
    keep_every_steps: steps at multiples of this are kept for ever; 0 for none.
    max_unsaved_steps: for so many steps a run goes on when nothing can be
      written.
    first_step: with which the run starts.
    model: companion files of the parameters, name -> text.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    every_steps: int,
    keep: int = 2,
    keep_every_steps: int = 0,
    max_unsaved_steps: int = 0,
    first_step: int = 0,
    model: Mapping[str, str] = types.MappingProxyType({}),
  ):
    if every_steps < 1 or keep < 1:
      raise ValueError(
        "config.checkpoint.every_steps and config.checkpoint.keep must be at "
        f"least 1, found {every_steps} and {keep}"
      )
    remote_steps.refuse_peers(workdir)
    self._model = model
    self._folder = epath.Path(files.absolute(workdir)) / snapshot.FOLDER
    self._published: remote_steps.Published | None = None
    if files.is_remote(workdir):
      root = self._folder
      self._published = remote_steps.Published(root, keep, keep_every_steps)
      self._folder = self._published.folder
      keep, keep_every_steps = 1, 0  # on this disk
    self._saving = -1  # the step that is being written
    self._not_begun: Exception | None = None  # why its writing did not begin
    self._newest = first_step  # what the run would go back to
    self._max_unsaved_steps = max(max_unsaved_steps, every_steps)
    _set_aside(snapshot.damaged_in(self._folder))
    policies = ocp.training.preservation_policies
    # Orbax's policies do not match its own protocols, says a type checker.
    kept: list[Any] = [policies.LatestN(keep)]
    if keep_every_steps:
      kept.append(policies.EveryNSteps(keep_every_steps))
    save_policies = ocp.training.save_decision_policies
    interval: Any = save_policies.FixedIntervalPolicy(every_steps)
    preservation: Any = policies.AnyPreservationPolicy(kept)
    context = ocp.Context()
    # A function, because Orbax copies a method with its object.
    context.async_options.post_finalization_callback = lambda: (
      self._write_digests()
    )
    self._checkpointer = ocp.training.Checkpointer(
      self._folder,
      context=context,
      save_decision_policy=interval,
      preservation_policy=preservation,
      # Removes what a killed process left half-written, never a complete step.
      cleanup_tmp_directories=True,
    )

  @property
  def latest(self) -> epath.Path | None:
    """The folder of the last complete step."""
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
    may donate them. If an earlier step could not be written, this one takes
    its place, and a warning says so.

    Args:
      step: number of updates so far.
      state: the state after that step.
      loader: its position, the next batch, is read before this returns.
      config: values that JSON can express, for people and for later jobs.
      force: save even off the interval. A step that is saved already stays.

    Raises:
      OSError: nothing could be written for too many steps.
    """
    if not force and not self._checkpointer.should_save(step):
      return False
    problem = self._settle()
    if self._is_saved(step):
      return False
    if problem and self.is_overdue(step):
      self.save_now(step, state, loader, config)
    else:
      self._begin(step, state, loader, config)
    return True

  def save_now(
    self,
    step: int,
    state: train_state.TrainState,
    loader: Loader,
    config: Mapping[str, Any],
  ) -> None:
    """Saves, and returns when it is done; what fails is tried again.

    Args:
      step: as of `save`.
      state: as of `save`.
      loader: as of `save`.
      config: as of `save`.

    Raises:
      OSError: it failed every time.
    """
    self._settle()
    problem = ""
    for pause in (*_PAUSES, 0.0):
      if self._is_saved(step):
        return
      self._begin(step, state, loader, config)
      problem = self._settle()
      time.sleep(pause if problem else 0.0)
    if problem:
      raise OSError(
        f"step {step} cannot be saved: {problem}. The run stops before it "
        f"loses more. It can go on from step {self._newest}: make room, or "
        "mend what fails, and run the same command again"
      )

  def is_overdue(self, step: int) -> bool:
    """Whether the run must not go on without a newer checkpoint."""
    return step - self._newest >= self._max_unsaved_steps

  def is_busy(self) -> bool:
    """Whether a step is being written."""
    if self._published is not None:
      return self._published.is_busy
    return self._checkpointer.is_saving_in_progress()

  def wait(self) -> None:
    """Blocks until nothing is being written; raises what went wrong."""
    not_begun, self._not_begun = self._not_begun, None
    if not_begun is not None:
      raise not_begun
    if self._published is not None:
      return self._published.wait()
    self._complete()

  def close(self) -> None:
    try:
      self.wait()
    finally:
      self._checkpointer.close()
      if self._published is not None:
        files.remove_folder(self._folder)

  def _is_saved(self, step: int) -> bool:
    latest = self._checkpointer.latest
    return latest is not None and latest.step == step

  def _begin(self, step, state, loader, config) -> None:
    """Begins to write a step; `_settle` tells how that went."""
    self._saving = step
    items = {
      "params": state.params,
      "opt_state": state.opt_state,
      "data": saved_items.JsonItem(
        saved_items.process_file(), loader.get_state()
      ),
      "meta": snapshot.meta(step),
      "config": saved_items.JsonItem("config.json", dict(config)),
      "model": saved_items.FilesItem(self._model),
    }
    if state.momentum is not None:
      items["momentum"] = state.momentum
    try:
      self._checkpointer.save_checkpointables_async(step, items, force=True)
    # Orbax and TensorStore have many types of errors for a disk that is full.
    except Exception as error:
      self._not_begun = error
    else:
      if self._published is not None:
        self._published.start(step, self._complete)

  def _complete(self) -> None:
    self._checkpointer.wait()
    if self._saving >= 0 and jax.process_index() == 0:
      try:
        digests.complete(self._folder / str(self._saving))
      except OSError as error:  # the step is complete and verifiable without
        log.warning("%s", error)

  def _settle(self) -> str:
    """Waits for the step that is being written; returns why it failed."""
    problem = ""
    try:
      self.wait()
    except Exception as error:
      problem = files.one_line(str(error))[:300] or type(error).__name__
    step, self._saving = self._saving, -1
    if step < 0:
      return ""
    if not processes.any_says(bool(problem)):
      self._newest = step
      return ""
    problem = problem or "another process could not write its part"
    self._remove(step)
    log.warning(
      "step %d could not be saved: %s. The last checkpoint is of step %d; the "
      "next step that is due is tried again",
      step,
      problem,
      self._newest,
    )
    return problem

  def _remove(self, step: int) -> None:
    """Removes what was written of a step, to make room for the next one."""
    if self._published is not None and self._is_saved(step):
      self._checkpointer.delete(step)  # on this disk, of one not published
    elif jax.process_index() == 0:
      for folder in self._folder.glob("*.orbax-checkpoint-tmp*"):
        files.remove_folder(folder)

  def _write_digests(self) -> None:
    """Called in the background, when every process has written its part."""
    if jax.process_index() == 0:
      # Not renamed yet: a process that is killed leaves no step without them.
      (folder,) = self._folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
      digests.write(folder)


def _set_aside(folders: Sequence[epath.Path]) -> None:
  """Renames damaged steps, so that they are neither used nor deleted."""
  if not folders:
    return
  for folder in folders:
    snapshot.forget(folder)
    if jax.process_index() == 0:
      number, target = 1, f"{folder}.damaged"
      while files.exists(target):
        number, target = number + 1, f"{folder}.damaged{number}"
      files.rename(folder, target)
      log.warning("%s is kept as %s", folder, target)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("damaged steps are set aside")
