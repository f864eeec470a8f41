"""Companion files of weights: config, vocabulary and preprocessing."""

import dataclasses
import json
import os
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from blip_jax.convert import model_configs, weights
from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.data import vocabulary
from blip_jax.models import card as card_lib
from blip_jax.models import config as model_config
from blip_jax.models import decoding
from blip_jax.runtime import files, json_files

BERT = "bert-base-uncased"


def model_files(
  card: card_lib.Card, tokenizer: tokenizer_lib.Tokenizer | None
) -> dict[str, str]:
  """The companion files of a checkpoint, by name.

  They are the model's description, its vocabulary, and the size and statistics
  that its images are resized and normalised to.
  """
  texts = {"model.json": _text(card.to_json())}
  if tokenizer is not None:
    texts |= tokenizer.files()
  return {**texts, "preprocessor_config.json": _text(preprocessing(card))}


def preprocessing(card: card_lib.Card) -> dict[str, Any]:
  """The content of Hugging Face's `preprocessor_config.json`."""
  height, width = card.config.vit.image_size
  return {
    "image_processor_type": "BlipImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": height, "width": width},
    "resample": 3,  # PIL's bicubic
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(model_config.IMAGE_MEAN),
    "image_std": list(model_config.IMAGE_STD),
  }


def hints(
  path: pathlib.Path, config_file: str | os.PathLike | None
) -> model_configs.Hints:
  """Reads a model config.

  Args:
    path: of the weights.
    config_file: a config; by default `config.json`, or the original's
      `med_config.json`, in the folder `path`, if there is one. The original
      splits its config in two: a `vit.json` next to the file is read too.
  """
  if config_file is None:
    candidates = (path / "config.json", path / "med_config.json")
    config_file = next(filter(json_files.is_there, candidates), None)
    if config_file is None:
      return model_configs.Hints()
  config_file = pathlib.Path(config_file)
  hints = model_configs.read_file(config_file)
  vit_file = config_file.parent / "vit.json"
  if not hints.vit and json_files.is_there(vit_file):
    hints.vit = model_configs.read_file(vit_file).vit
    hints.source += f" or {vit_file}"
  return hints


def folder_of(path: pathlib.Path) -> pathlib.Path:
  """The folder of weights, which are a file or a folder."""
  return path if files.is_folder(path) else path.parent


def tokenizer_of(
  card: card_lib.Card,
  path: pathlib.Path,
  name_or_dir: str | os.PathLike | None,
  report: weights.Report,
  hints: model_configs.Hints | None = None,
) -> tuple[card_lib.Card, tokenizer_lib.Tokenizer | None]:
  """Finds the vocabulary of a model.

  Args:
    card: of the model.
    path: of its weights.
    name_or_dir: a vocabulary's folder or hub id; by default the vocabulary
      next to the weights, else BERT's from the hub if the sizes agree.
    report: gets a warning if there is no vocabulary, or if a config has other
      token ids.
    hints: of the config of external weights.

  Returns:
    The card with the special tokens of the vocabulary, and the tokenizer; the
    card as it is, and None, if there is no vocabulary.

  Raises:
    ValueError: the vocabulary and the model differ in size.
  """
  size = card.config.med.vocab_size
  folder = folder_of(path)
  if name_or_dir is None and vocabulary.exists_in(folder):
    name_or_dir = folder
  reason = f"the model's vocabulary of {size} tokens is not BERT's"
  if name_or_dir is None and size == model_configs.BERT_VOCAB:
    try:
      return tokenizer_of(card, path, BERT, report, hints)
    except ValueError as error:
      reason = str(error)
  if name_or_dir is None:
    report.warnings.append(
      f"no vocabulary: {reason}. Give one with --tokenizer (tokenizer=); "
      "without it, the model reads and generates token ids only"
    )
    return card, None
  tokenizer = tokenizer_lib.Tokenizer.load(name_or_dir)
  if tokenizer.vocab_size != size:
    raise ValueError(
      f"{name_or_dir}: expected a vocabulary of {size} tokens, as the model "
      f"has ([DEC] and [ENC] included), found {tokenizer.vocab_size}; give the "
      "vocabulary of these weights with --tokenizer (tokenizer=)"
    )
  tokens = model_config.SpecialTokens(**tokenizer.special_ids)
  if hints is not None:
    report.warnings += _token_warnings(hints, tokens)
  med = dataclasses.replace(card.config.med, tokens=tokens)
  config = dataclasses.replace(card.config, med=med)
  return dataclasses.replace(card, config=config), tokenizer


def _token_warnings(
  hints: model_configs.Hints, tokens: model_config.SpecialTokens
) -> list[str]:
  """Ids of a config that are not those of the vocabulary."""
  found = dataclasses.asdict(tokens)
  return [
    f"{hints.source}: [{name.upper()}] is token {id}; in the vocabulary it is "
    f"{found[name]}, which is used"
    for name, id in hints.tokens.items()
    if id != found[name]
  ]


def hugging_face_warnings(
  family: str,
  config: model_config.BlipConfig,
  is_released: bool,
) -> list[str]:
  """Differences from Hugging Face's results with the same weights.

  Args:
    family: of the model.
    config: of the model.
    is_released: whether `registry` has the checkpoint, and so its own note
      about the image size.
  """
  warnings = []
  if family in ("itm", "vqa"):
    warnings.append(
      "Hugging Face starts image-grounded texts with [CLS]; here they start "
      "with [ENC], as in training (legacy_cls=True reproduces Hugging Face)"
    )
  if family == "vqa":
    warnings.append(
      "transformers 5 lets answers attend to the padding of questions (it "
      "loses the mask before the decoder); here they do not, as in training"
    )
  if (
    family == "vqa" and config.vit.image_size == (384, 384) and not is_released
  ):
    warnings.append(
      "position embeddings are for 384 x 384 pixels; the original answers at "
      "480 x 480, and they cannot be scaled back"
    )
  return warnings


_PROCESSOR = {
  "image_processor_type": str,
  "size": (int, dict),
  "rescale_factor": float,
  "image_mean": [float],
  "image_std": [float],
}
# What BlipImageProcessor and its variants do not do.
_NOT_DONE = {"do_center_crop": False, "do_pad": False}


def image_warnings(folder: pathlib.Path, card: card_lib.Card) -> list[str]:
  """What image processors next to weights do and this package does not.

  Args:
    folder: of the weights. transformers 5 writes `processor_config.json`,
      earlier versions `preprocessor_config.json`.
    card: of the model, in its own image size.
  """
  warnings = []
  for name in ("processor_config.json", "preprocessor_config.json"):
    values = _read(folder / name, {"image_processor": _PROCESSOR, **_PROCESSOR})
    values = values.get("image_processor", values)
    for key, expected in {**preprocessing(card), **_NOT_DONE}.items():
      found = values.get(key, expected)
      if not _same(key, found, expected):
        why = (
          "the size of the weights' position embeddings (image_size=)"
          if key == "size"
          else "as BLIP was trained"
        )
        warnings.append(f"{name}: {key} is {found}; {expected} is used, {why}")
  return warnings


def _same(key: str, found: Any, expected: Any) -> bool:
  if key == "image_processor_type":
    return str(found).startswith(expected)
  if key == "size" and isinstance(found, int):
    return {"height": found, "width": found} == expected
  if key in ("image_mean", "image_std", "rescale_factor"):
    return np.shape(found) == np.shape(expected) and np.allclose(
      found, expected, rtol=0, atol=1e-6
    )
  return found == expected


# Hugging Face's name -> the field of `decoding.Decoding`, and what to add to
# the value: new tokens follow [DEC].
_GENERATION = {
  "max_length": ("max_length", 0),
  "max_new_tokens": ("max_length", 1),
  "min_length": ("min_length", 0),
  "min_new_tokens": ("min_length", 1),
  "num_beams": ("num_beams", 0),
  "num_return_sequences": ("num_return_sequences", 0),
  "repetition_penalty": ("repetition_penalty", 0),
  "no_repeat_ngram_size": ("no_repeat_ngram_size", 0),
  "temperature": ("temperature", 0),
  "top_k": ("top_k", 0),
  "top_p": ("top_p", 0),
}
# Says nothing about the texts. Token ids come from `config.json`, in
# transformers too.
_NO_OPTION = re.compile(
  r"transformers_version|_.*|(pad|bos|eos|sep|decoder_start)_token_id|.*cache.*"
  r"|.*compile.*|.*assistant.*|output_.*|return_dict_in_generate"
)
# Numbers at which an option changes nothing.
_NEUTRAL = {
  "diversity_penalty": 0,
  "encoder_no_repeat_ngram_size": 0,
  "encoder_repetition_penalty": 1,
  "epsilon_cutoff": 0,
  "eta_cutoff": 0,
  "guidance_scale": 1,
  "length_penalty": 1,
  "min_p": 0,
  "num_beam_groups": 1,
  "penalty_alpha": 0,
  "typical_p": 1,
}


def generation(folder: pathlib.Path, report: weights.Report) -> dict[str, Any]:
  """Reads decoding options from Hugging Face's `generation_config.json`.

  Args:
    folder: of the weights.
    report: gets a warning for each option that is not implemented.

  Returns:
    Fields of `decoding.Decoding`; none if there is no such file.

  Raises:
    ValueError: an option has an impossible value; names the file.
  """
  file, options = folder / "generation_config.json", {}
  values = _read(file, model_configs.GENERATION)
  if values.get("do_sample"):
    options = {"sample": True, "num_beams": 1, "top_k": 50}
  for key, value in values.items():
    if key in _GENERATION and value is not None:
      field, more = _GENERATION[key]
      options[field] = value + more
    elif not (key in _GENERATION or key == "do_sample" or _neutral(key, value)):
      report.warnings.append(
        f"{file.name}: {key} is {value}, which is not implemented; captions "
        "differ from Hugging Face's"
      )
  try:
    # Every text has at least [DEC] before it.
    decoding.make(options, prompt_length=1, max_positions=sys.maxsize)
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from error
  return options


def _neutral(key: str, value: Any) -> bool:
  """Whether an option changes nothing: it is off, or a number that is."""
  if _NO_OPTION.fullmatch(key) or value in (None, "", [], {}):
    return True
  if isinstance(value, bool):
    return not value
  return key in _NEUTRAL and value == _NEUTRAL[key]


def _read(path: pathlib.Path, types: Mapping[str, Any]) -> dict[str, Any]:
  """The content of a file, which may be absent."""
  return json_files.read(path, types) if json_files.is_there(path) else {}


def _text(value: Any) -> str:
  return json.dumps(value, indent=2) + "\n"
