"""What lies beside weights: config, vocabulary and preprocessing."""

import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from blip_jax.convert import model_configs, weights
from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.models import card as card_lib
from blip_jax.models import config as model_config

BERT = "bert-base-uncased"


def model_files(
  card: card_lib.Card, tokenizer: tokenizer_lib.Tokenizer | None
) -> dict[str, str]:
  """What lies beside the weights: their description, vocabulary and the size
  and statistics that pictures are brought to."""
  files = {"model.json": _text(card.to_json())}
  if tokenizer is not None:
    files |= tokenizer.files()
  return {**files, "preprocessor_config.json": _text(preprocessing(card))}


def preprocessing(card: card_lib.Card) -> dict[str, Any]:
  """In the words of Hugging Face's image processors."""
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
  path: pathlib.Path, given: str | os.PathLike | None
) -> model_configs.Hints:
  """What config files say: the one that is given, else a folder's own.

  The original splits its config in two; `vit.json` is read beside the given.
  """
  if given is None:
    given = path / "config.json"
    if not given.is_file():
      return model_configs.Hints()
  given = pathlib.Path(given)
  found = model_configs.read_hints(_json(given))
  beside = given.parent / "vit.json"
  if not found.vit and beside.is_file():
    found.vit = model_configs.read_hints(_json(beside)).vit
  return found


def tokenizer_of(
  card: card_lib.Card,
  path: pathlib.Path,
  given: str | os.PathLike | None,
  report: weights.Report,
) -> tuple[card_lib.Card, tokenizer_lib.Tokenizer | None]:
  """The given vocabulary, one beside the weights, or BERT's of the hub; and
  the card with its special tokens. None, and a warning, where there is none.

  Raises:
    ValueError: it is not of the model's size.
  """
  size = card.config.med.vocab_size
  folder = path if path.is_dir() else path.parent
  if given is None and tokenizer_lib.has_vocabulary(folder):
    given = folder
  why = f"the model's vocabulary of {size} tokens is not BERT's."
  if given is None and size == model_configs.BERT_VOCAB:
    try:
      return tokenizer_of(card, path, BERT, report)
    except ValueError as error:
      why = str(error)
  if given is None:
    report.warnings.append(
      f"no vocabulary: {why} Give one with --tokenizer (tokenizer=); without, "
      "the model takes and gives token ids only"
    )
    return card, None
  tokenizer = tokenizer_lib.Tokenizer.load(given)
  if tokenizer.vocab_size != size:
    raise ValueError(
      f"{given}: a vocabulary of {tokenizer.vocab_size} tokens ([DEC] and "
      f"[ENC] included) for a model of {size}; give the one that belongs to "
      "these weights with --tokenizer (tokenizer=)"
    )
  tokens = model_config.SpecialTokens(**tokenizer.special_ids)
  med = dataclasses.replace(card.config.med, tokens=tokens)
  config = dataclasses.replace(card.config, med=med)
  return dataclasses.replace(card, config=config), tokenizer


def traps(
  path: pathlib.Path, family: str, config: model_config.BlipConfig, noted: bool
) -> list[str]:
  """Where Hugging Face computes something else from the same weights; `noted`
  is whether the registry has said of these what it knows."""
  found = []
  if family in ("itm", "vqa"):
    found.append(
      "Hugging Face encodes texts that look at an image with [CLS] first; here "
      "it is [ENC], as in training (legacy_cls=True gives their numbers)"
    )
  if family == "vqa":
    found.append(
      "transformers 5 lets answers look at the padding of questions (the mask "
      "is lost on its way to the decoder); here they do not, as in training"
    )
  if family == "vqa" and config.vit.image_size == (384, 384) and not noted:
    found.append(
      "position embeddings are for 384 x 384 pixels; the original answers at "
      "480, and they cannot be scaled back"
    )
  file = path / "preprocessor_config.json"
  if file.is_file():
    said = _json(file)
    for key, expected in (
      ("image_mean", model_config.IMAGE_MEAN),
      ("image_std", model_config.IMAGE_STD),
    ):
      if not np.allclose(said.get(key, expected), expected, atol=1e-6):
        found.append(
          f"{file.name}: {key} is {said[key]}; set to {list(expected)}, which "
          "BLIP was trained with"
        )
  return found


def _json(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise ValueError(f"{path}: cannot be read as JSON: {error}") from error


def _text(value: Any) -> str:
  return json.dumps(value, indent=2) + "\n"
