"""What a run may change when it is resumed.

Most settings decide what is computed, and a run is one computation: resumed
with another batch size, it would train too long or end early, at rates that
belong to other steps.
"""

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from blip_jax.runtime import files, overrides, remote_steps, snapshot

log = logging.getLogger(__name__)

# Where and how fast it runs, what it reports and keeps, and what only a start
# reads. The vocabulary is compared by its content, not by its path.
MAY_CHANGE = (
  "job",
  "compilation_cache",
  "log_every_steps",
  "profile",
  "grad_accum_steps",
  "tracker",
  "mesh",
  "checkpoint",
  "evals",
  "generation",
  "init",
  "tokenizer",
  "data.image_root",
  "data.num_threads",
  "data.num_workers",
  "data.max_bad_fraction",
  "model.attention",
  "model.vit_remat",
  "model.text_remat",
  "optim.clip",
)
# Companion files that follow from the config.
_DESCRIPTIONS = {"model.json", "preprocessor_config.json"}


def config_of(folder: str | os.PathLike) -> dict[str, Any]:
  """The config that a checkpoint was saved with; {} if it has none."""
  path = snapshot.find(folder) / "config" / "config.json"
  return files.read_json(path) if files.exists(path) else {}


def check(
  folder: str | os.PathLike,
  config: Mapping[str, Any],
  model_files: Mapping[str, str],
  num_rows: int,
  refuse: bool = True,
) -> None:
  """Compares the config of a checkpoint with the one that resumes it.

  Changes that are allowed are logged. Keys that only one of them has come from
  another version of the package, and are not compared.

  Args:
    folder: of the checkpoint.
    config: values that JSON can express.
    model_files: companion files of the parameters, name -> text.
    num_rows: of the training data.
    refuse: whether other changes are errors; if not, they are logged too.

  Raises:
    ValueError: a change that is not allowed; names the key, then, and now.
  """
  then = overrides.leaves(config_of(folder))
  now = overrides.leaves(json.loads(json.dumps(config)))
  changed = {
    key: f"  config.{key}: {then[key]!r} then, {now[key]!r} now"
    for key in now
    if key in then and then[key] != now[key]
  }
  # Epochs only give the number of steps.
  if changed.keys() & {"num_epochs", "num_steps"} == {"num_epochs"}:
    del changed["num_epochs"]
  # A vocabulary may move, but not change.
  model = snapshot.find(folder) / "model"
  for name in model_files.keys() - _DESCRIPTIONS:
    path = model / name
    if files.exists(path) and files.read_text(path) != model_files[name]:
      changed[name] = f"  the vocabulary: {name} differs"
    changed.pop("tokenizer", None)
  rows_then = _num_rows(folder)
  if rows_then not in (None, num_rows):
    changed["num_rows"] = (
      f"  rows of the training data: {rows_then} then, {num_rows} now"
    )
  refused = [key for key in changed if not _may_change(key)]
  if refused and refuse:
    lines = "\n".join(changed[key] for key in refused)
    unset = " --config.init.weights=" if now.get("init.weights") else ""
    raise ValueError(
      f"{remote_steps.source(folder)} was saved by a run with other settings:\n"
      f"{lines}\n"
      "A run keeps them to its end. To resume it, use the earlier ones; to go "
      "on from this state with the new ones, use another --workdir and "
      f"--config.init.restore={_run_of(folder)}{unset}"
    )
  if changed:
    log.info(
      "Changed since %s was saved:\n%s", folder, "\n".join(changed.values())
    )


def _run_of(folder: str | os.PathLike) -> str:
  """The workdir of a checkpoint."""
  path = files.as_path(remote_steps.source(folder))
  return str(path.parents[1] if path.parent.name == snapshot.FOLDER else path)


def _num_rows(folder: str | os.PathLike) -> int | None:
  """The number of rows that a run was trained on."""
  data = snapshot.find(folder) / "data"
  names = files.list_folder(data) if files.is_folder(data) else []
  positions = [name for name in names if name.startswith("process_")]
  if not positions:
    return None
  return files.read_json(data / positions[0]).get("num_rows")


def _may_change(key: str) -> bool:
  return any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE)
