"""What a run asks of its config, before anything is read or allocated.

Its keys and their defaults are in `blip_jax.defaults`.
"""

from ml_collections import ConfigDict

JOBS = ("train", "evaluate")  # of a task; others have configs of their own
TASKS = ("pretrain", "caption", "retrieval")
SCOPES = ("global", "local")
TARGETS = ("idx", "diagonal")


def validate(config: ConfigDict) -> None:
  """Refuses what could not run, before anything is read or allocated.

  Raises:
    ValueError: names the key, what it may be, and what was found.
  """
  _one_of("config.job", config.job, JOBS)
  _one_of("config.task", config.task, TASKS)
  _one_of("config.scope", config.scope, SCOPES)
  _one_of("config.model.dtype", config.model.dtype, ("float32", "bfloat16"))
  _positive(
    config,
    "batch_size",
    "log_every_steps",
    "checkpoint.every_steps",
    "evals.batch_size",
    "data.max_words",
  )
  if config.task in ("pretrain", "retrieval"):
    _positive(config, f"{config.task}.queue_size")
  if config.task == "retrieval":
    own = config.retrieval
    _one_of("config.retrieval.itc_targets", own.itc_targets, TARGETS)
    _one_of("config.retrieval.negatives", own.negatives, SCOPES)
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


def with_steps(config: ConfigDict, rows_per_epoch: float) -> ConfigDict:
  """The config with its numbers of steps, where it left them to the data.

  As in the original, an epoch's last rows are left out if they fill no batch.

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
  return config


def splits(config: ConfigDict) -> dict[str, ConfigDict]:
  """The held-out splits that have a source, by their names."""
  return {
    name: split
    for name, split in config.evals.items()
    if isinstance(split, ConfigDict) and split.source
  }


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise ValueError(f"{key}: expected one of {choices}, found {value!r}")


def _positive(config: ConfigDict, *keys: str) -> None:
  for key in keys:
    value = config
    for part in key.split("."):
      value = value[part]
    if value < 1:
      raise ValueError(f"config.{key}: expected at least 1, found {value}")
