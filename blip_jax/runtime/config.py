"""Configs: how they are typed, and checks before anything is read or allocated.

Keys and their defaults are in `blip_jax.defaults`, and in the file of each task
(`blip_jax/tasks`).
"""

import logging
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from blip_jax.runtime import trackers

if TYPE_CHECKING:

  class Config(ConfigDict):
    """A `ConfigDict` as a type checker should see it.

    A key's type is known only once the config is made, so that ConfigDict
    declares the union of everything a value may be. Reading a key gives `Any`
    instead; `validate` checks values when a job starts.
    """

    def __init__(self, initial_dictionary: Any = None, **kwargs: Any): ...
    def __getattr__(self, key: str) -> Any: ...
    def __setattr__(self, key: str, value: Any) -> None: ...
    def __getitem__(self, key: str) -> Any: ...

else:
  Config = ConfigDict

log = logging.getLogger(__name__)

SCOPES = ("global", "local")


def one_of(key: str, value: Any, choices: tuple[str, ...]) -> None:
  """Raises `ValueError` for a value that is none of the choices."""
  if value not in choices:
    raise ValueError(f"{key}: expected one of {choices}, found {value!r}")


def at_least(least: int, config: Config, *keys: str) -> None:
  """Raises `ValueError` for the first key, with dots, that is below `least`."""
  for key in keys:
    value: Any = config
    for part in key.split("."):
      value = value[part]
    if not value >= least:  # NaN is not either
      raise ValueError(
        f"config.{key}: expected at least {least}, found {value}"
      )


def validate(config: Config) -> None:
  """Refuses what no task could run.

  Raises:
    ValueError: names the key, what it may be, and what was found.
  """
  one_of("config.job", config.job, ("train", "evaluate"))
  one_of("config.tracker", config.tracker, ("", *trackers.NAMES))
  one_of("config.scope", config.scope, SCOPES)
  if config.model.dtype == "float8":
    raise ValueError(
      "config.model.dtype: 'float8' is neither for training nor for the "
      "evaluation of a task; captioning and other jobs take it as config.dtype"
    )
  one_of("config.model.dtype", config.model.dtype, ("float32", "bfloat16"))
  at_least(
    1,
    config,
    "batch_size",
    "grad_accum_steps",
    "log_every_steps",
    "checkpoint.every_steps",
    "evals.batch_size",
    "data.max_words",
  )
  at_least(
    0, config, "checkpoint.every_seconds", "checkpoint.max_unsaved_steps"
  )
  if config.profile and not (
    len(config.profile) == 2
    and all(isinstance(step, int) for step in config.profile)
    and 1 <= config.profile[0] <= config.profile[1]
  ):
    raise ValueError(
      "config.profile: expected the first and the last step of a trace, such "
      f"as (10, 12), found {config.profile}"
    )
  asked = config.evals.checkpoint
  if asked not in ("latest", "best") and not asked.isdecimal():
    raise ValueError(
      "config.evals.checkpoint: expected latest, best or the number of a step, "
      f"found {asked!r}"
    )
  known = sorted(
    k for k, v in config.evals.items() if isinstance(v, ConfigDict)
  )
  for metric in config.evals.best:
    if metric.partition("/")[0] not in known:
      raise ValueError(
        f"config.evals.best: expected `split/metric` with one of the splits "
        f"{known}, found {metric!r}"
      )
  if config.job == "train" and not (
    any(config.data.train) or config.data.rotate
  ):
    raise ValueError(
      "config.data.train: no source to train on; for example "
      "--config.data.train=captions.json --config.data.image_root=images"
    )


def with_steps(config: Config, rows_per_epoch: float) -> Config:
  """Returns the config with the numbers of steps that it left to the data.

  As in the original, the last rows of an epoch are left out if they do not
  fill a batch.  A run that is shorter than its warm-up gets a shorter one.

  Raises:
    ValueError: there is neither a number of steps nor one of epochs.
  """
  config = config.copy_and_resolve_references()
  if not config.optim.steps_per_epoch:
    steps = int(rows_per_epoch // config.batch_size)
    config.optim.steps_per_epoch = max(steps, 1)
  if not config.num_steps:
    config.num_steps = round(config.num_epochs * config.optim.steps_per_epoch)
  if config.num_steps < 1:
    raise ValueError(
      f"config.num_steps: expected at least 1, found {config.num_steps}, and "
      f"config.num_epochs is {config.num_epochs}; set one of them"
    )
  _shorten_warmup(config)
  return config


def _shorten_warmup(config: Config) -> None:
  """Leaves a run that is shorter than its warm-up a tenth for it."""
  steps = config.num_steps // 10
  if config.optim.schedule == "cosine_epoch":  # has no warm-up
    return
  if config.optim.warmup_steps >= config.num_steps:
    log.warning(
      "config.optim.warmup_steps: %d instead of %d, because the run has only "
      "%d steps",
      steps,
      config.optim.warmup_steps,
      config.num_steps,
    )
    config.optim.warmup_steps = steps


def splits(config: Config) -> dict[str, Config]:
  """The held-out splits that have a source, by name."""
  return {
    name: config.evals[name]
    for name, split in config.evals.items()
    if isinstance(split, ConfigDict) and split.source
  }


def prompt(config: Config) -> str:
  """What every text of the task starts with; "" for tasks without a prompt."""
  return config[config.task].get("prompt", "")
