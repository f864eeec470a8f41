"""What a config leaves open is taken from the model that a job starts from.

A model brings its vocabulary, its sizes and its prompt along: whoever
fine-tunes or evaluates one need not repeat them.
"""

import logging
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from blip_jax.convert import companions, model_configs, opening
from blip_jax.data import vocabulary
from blip_jax.models import card as card_lib
from blip_jax.models import config as model_config
from blip_jax.runtime import (
  overrides,
  remote_steps,
  resume,
  snapshot,
  start,
)
from blip_jax.runtime.config import Config

log = logging.getLogger(__name__)

# BLIP's own values, for jobs that start from scratch.
_BLIP = {
  "tokenizer": companions.BERT,
  "model.variant": "base",
  "model.image_size": 224,
  "caption.prompt": card_lib.PROMPT,
}
_SIZES = ("model.variant", "model.patch_size", "model.image_size")
# Of `data`, what decides how captions are read.
_DATA = ("data.max_words", "data.max_length")


def resolve(config: Config, workdir: str | os.PathLike) -> Config:
  """Returns the config with a value for every key that a model has.

  A key that is unset gets the value of the model that the job starts from (see
  `start.origin`), and BLIP's own if there is no model.

  Args:
    config: of a task.
    workdir: the run's folder.

  Raises:
    ValueError: the model has no vocabulary, or its images are not square; or
      the run to evaluate was trained for another task.
  """
  config = config.copy_and_resolve_references()
  origin = start.origin(config, workdir)
  if origin.is_of_workdir and config.job == "evaluate":
    _refuse_other_task(config, workdir)
  if origin.source:
    taken = _fill(config, _of_model(config, origin.source))
    _log_taken(origin.source, taken)
  return complete(config)


def complete(config: Config) -> Config:
  """Returns the config with BLIP's own values for keys that are unset."""
  config = config.copy_and_resolve_references()
  _fill(config, _BLIP)
  if config.model.patch_size is None:
    sizes = model_config.VARIANTS.get(config.model.variant)
    config.model.patch_size = sizes and sizes["vit"]["patch_size"]
  return config


def yield_to_model(
  config: Config,
  workdir: str | os.PathLike,
  given: Collection[str],
  recipe_variant: str | None,
) -> Config:
  """Unsets what a recipe says of a model other than the one that is given.

  A recipe's sizes are those of its variant. If a job starts from a model of
  another variant, and whenever it only evaluates one, the model's own sizes and
  vocabulary apply, but for what the command line says. A run that is evaluated
  keeps the settings that it was trained with, and those of its splits, unless
  the recipe has another source for a split.

  Args:
    config: a recipe, with what the command line changes.
    workdir: the run's folder.
    given: the keys that the command line sets, such as "model.image_size".
    recipe_variant: `config.model.variant` before the command line changed it.
  """
  origin = start.origin(config, workdir)
  if not origin.source:
    return config
  config = config.copy_and_resolve_references()
  card, _ = _describe(config, origin.source)
  variant = model_config.variant_of(card.config)
  if config.job == "evaluate" or recipe_variant not in (None, variant):
    for key in ("tokenizer", *_SIZES):
      folder, name = _folder_of(config, key)
      if folder is not None and key not in given:
        folder[name] = None
  if config.job == "evaluate" and origin.is_of_workdir:
    taken = _of_run(config, resume.config_of(workdir), given)
    for key, value in taken.items():
      folder, name = _folder_of(config, key)
      folder[name] = value
    _log_taken(workdir, taken)
  return config


def _of_run(
  config: Config, saved: Mapping[str, Any], given: Collection[str]
) -> dict[str, Any]:
  """What a run that is evaluated was trained with and the config differs in."""
  now, then = overrides.leaves(config), overrides.leaves(saved)
  parts = [config.task, "generation", *_DATA]
  for name, split in config.evals.items():
    key = f"evals.{name}.source"
    is_own = key in now and split.source in ("", then.get(key))
    if is_own and key not in given:
      parts.append(f"evals.{name}")
  return {
    key: tuple(then[key]) if isinstance(then[key], list) else then[key]
    for key, value in now.items()
    if key in then
    and key not in given
    and any(key == part or key.startswith(f"{part}.") for part in parts)
    and then[key] != (list(value) if isinstance(value, tuple) else value)
  }


def _log_taken(source: Any, taken: Mapping[str, Any]) -> None:
  if taken:
    values = ", ".join(f"{key}={value!r}" for key, value in taken.items())
    log.info("Taken from %s: %s", remote_steps.source(source), values)


def _refuse_other_task(config: Config, workdir: str | os.PathLike) -> None:
  task = resume.config_of(workdir).get("task", config.task)
  if task != config.task:
    raise ValueError(
      f"config.job=evaluate: {workdir} holds a run of the task {task!r}, but "
      f"this config is one of {config.task!r}. Evaluate the run with a config "
      f"of {task!r}; or its weights with this one, by "
      f"--config.init.weights={workdir} and another --workdir"
    )


def _of_model(config: Config, source: str) -> dict[str, Any]:
  """What a model says about keys of a config."""
  card, folder = _describe(config, source)
  values = {
    "tokenizer": _vocabulary(card, folder),
    "model.variant": model_config.variant_of(card.config),
    "model.patch_size": card.config.vit.patch_size,
    "model.image_size": card.config.vit.image_size[0],
  }
  # Released captioners were trained with BLIP's prompt, whatever their files
  # say; a run's card says what it was trained with.
  if card.family == config.task == "caption" and snapshot.holds_one(source):
    values["caption.prompt"] = card.prompt
  if config.tokenizer is None and values["tokenizer"] is None:
    raise ValueError(
      f"{source}: expected its vocabulary (vocab.txt) next to the weights, "
      f"whose {card.config.med.vocab_size} tokens are not BERT's; found none "
      f"in {folder}. Set config.tokenizer to the folder that has it"
    )
  height, width = card.config.vit.image_size
  if config.model.image_size is None and height != width:
    raise ValueError(
      f"{source}: its images have {height} x {width} pixels, but runs need "
      "square ones. Set config.model.image_size to the side of a square"
    )
  return values


def _describe(
  config: Config, source: str
) -> tuple[card_lib.Card, pathlib.Path]:
  try:
    return opening.describe(source)
  except ValueError as error:
    key = "config.init.weights: " if source == config.init.weights else ""
    raise ValueError(f"{key}{error}") from error


def _vocabulary(card: card_lib.Card, folder: pathlib.Path) -> str | None:
  if vocabulary.exists_in(folder):
    return str(folder)
  is_bert = card.config.med.vocab_size == model_configs.BERT_VOCAB
  return companions.BERT if is_bert else None


def _fill(config: Config, values: Mapping[str, Any]) -> dict[str, Any]:
  """Sets the keys of the config that are unset; returns what it set."""
  taken = {}
  for key, value in values.items():
    folder, name = _folder_of(config, key)
    if folder is None or value is None:
      continue
    if folder.get(name, "absent") is None:
      folder[name] = taken[key] = value
  return taken


def _folder_of(config: Config, key: str) -> tuple[Any, str]:
  """The part of a config that would hold a key; None if there is none."""
  *folders, name = key.split(".")
  part: Any = config
  for folder in folders:
    part = part.get(folder) if isinstance(part, ConfigDict) else None
  return (part if isinstance(part, ConfigDict) else None), name
