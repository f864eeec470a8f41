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
from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.models import card as card_lib
from blip_jax.models import config as model_config
from blip_jax.runtime import checkpoint, overrides, resume, snapshot
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


def resolve(config: Config, workdir: str | os.PathLike) -> Config:
  """Returns the config with a value for every key that a model has.

  A key that is unset gets the value of the model that the job starts from (see
  `checkpoint.origin`), and BLIP's own if there is no model. A run that is
  evaluated also brings the sources of its splits along.

  Args:
    config: of a task.
    workdir: the run's folder.

  Raises:
    ValueError: the model has no vocabulary, or its images are not square.
  """
  config = config.copy_and_resolve_references()
  origin = checkpoint.origin(config, workdir)
  if origin.source:
    taken = _fill(config, _of_model(config, origin.source), unset=None)
    if origin.kind in ("resumed", "best") and config.job == "evaluate":
      taken |= _fill(config, _sources_of_run(workdir), unset="")
    if taken:
      values = ", ".join(f"{key}={value}" for key, value in taken.items())
      log.info("Taken from %s: %s", origin.source, values)
  return complete(config)


def complete(config: Config) -> Config:
  """Returns the config with BLIP's own values for keys that are unset."""
  config = config.copy_and_resolve_references()
  _fill(config, _BLIP, unset=None)
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
  has the settings of its task that it was trained with.

  Args:
    config: a recipe, with what the command line changes.
    workdir: the run's folder.
    given: the keys that the command line sets, such as "model.image_size".
    recipe_variant: `config.model.variant` before the command line changed it.
  """
  origin = checkpoint.origin(config, workdir)
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
  if config.job == "evaluate" and origin.kind in ("resumed", "best"):
    _restore_task(config, workdir, given)
  return config


def _restore_task(
  config: Config, workdir: str | os.PathLike, given: Collection[str]
) -> None:
  """Sets the keys of the task as they were when the run was trained."""
  task, saved = config.task, resume.config_of(workdir)
  for name, value in saved.get(config.task, {}).items():
    if name in config[task] and f"{task}.{name}" not in given:
      is_tuple = isinstance(value, list)
      config[task][name] = tuple(value) if is_tuple else value


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
  if tokenizer_lib.has_vocabulary(folder):
    return str(folder)
  is_bert = card.config.med.vocab_size == model_configs.BERT_VOCAB
  return companions.BERT if is_bert else None


def _sources_of_run(workdir: str | os.PathLike) -> dict[str, str]:
  """Where the data of a run is, by key."""
  return {
    key: value
    for key, value in overrides.leaves(resume.config_of(workdir)).items()
    if key.startswith(("data.", "evals.")) and isinstance(value, str)
  }


def _fill(
  config: Config, values: Mapping[str, Any], unset: str | None
) -> dict[str, Any]:
  """Sets the keys of the config that are unset; returns what it set."""
  taken = {}
  for key, value in values.items():
    folder, name = _folder_of(config, key)
    if folder is not None and folder.get(name, "absent") == unset != value:
      folder[name] = taken[key] = value
  return taken


def _folder_of(config: Config, key: str) -> tuple[Any, str]:
  """The part of a config that would hold a key; None if there is none."""
  *folders, name = key.split(".")
  part: Any = config
  for folder in folders:
    part = part.get(folder) if isinstance(part, ConfigDict) else None
  return (part if isinstance(part, ConfigDict) else None), name
