"""Hostile companion files of weights are refused by name, or do no harm."""

import contextlib
import json
import shutil
import time

import pytest
import transformers

from blip_jax.convert import companions, model_configs, opening, reader, write
from blip_jax.data import tokenizer, vocabulary
from blip_jax.models import decoding
from tests import helpers, hostile
from tests.hostile import configs

SECONDS = 10


def _hugging_face(folder):
  """The files of a model, as transformers writes them."""
  write.write(helpers.open_golden("blip_decoder"), folder, "hf")
  return folder


def _vocabulary(folder):
  """All files that a vocabulary may have."""
  shutil.copytree(helpers.GOLDEN_TOKENIZER, folder)
  bert = transformers.BertTokenizer.from_pretrained(folder)
  bert.save_pretrained(folder)
  config = json.loads((folder / "tokenizer_config.json").read_text())
  added = bert.backend_tokenizer.get_added_tokens_decoder()
  config["added_tokens_decoder"] = {
    str(id): {"content": token.content, "special": True}
    for id, token in added.items()
  }
  texts = {
    "tokenizer_config.json": config,
    "added_tokens.json": {t.content: id for id, t in added.items()},
    "special_tokens_map.json": {"pad_token": "[PAD]", "sep_token": "[SEP]"},
  }
  for name, value in texts.items():
    (folder / name).write_text(json.dumps(value))
  tokenizer.Tokenizer.load(folder)
  return folder


def _load_hugging_face(folder):
  opened = opening.open_checkpoint(folder)
  # Settings that contradict each other are refused when they are used.
  with contextlib.suppress(ValueError):
    decoding.make(opened.card.generation, 4, 500)


def _load_index(folder):
  tensors = reader.read(folder / "model.safetensors.index.json")
  assert all(tensors.shape(name) is not None for name in tensors)


def _load_card(folder):
  model_configs.read_card(folder / "model.json")


def _load_med(folder):
  opening.open_checkpoint(
    helpers.golden_checkpoint("blip_decoder"),
    model_config=folder / "med_config.json",
    tokenizer=helpers.GOLDEN_TOKENIZER,
  )


def _check(tmp_path, scale):
  hf = _hugging_face(tmp_path / "hf")
  index = tmp_path / "index"
  index.mkdir()
  shutil.copy(hf / "model.safetensors", index / "model-1.safetensors")
  names = reader.read(index / "model-1.safetensors")
  shards = {"weight_map": dict.fromkeys(names, "model-1.safetensors")}
  (index / "model.safetensors.index.json").write_text(json.dumps(shards))
  card = helpers.open_golden("blip_decoder").card
  (index / "model.json").write_text(
    companions.model_files(card, None)["model.json"]
  )
  shutil.copytree(helpers.GOLDEN / "configs", tmp_path / "original")
  kinds = (
    # (folder, function that reads it, files, number of cases)
    (
      hf,
      _load_hugging_face,
      ["config.json", "generation_config.json", "preprocessor_config.json"],
      6 * scale,
    ),
    (
      _vocabulary(tmp_path / "vocabulary"),
      tokenizer.Tokenizer.load,
      list(vocabulary.FILES),
      6 * scale,
    ),
    (index, _load_index, ["model.safetensors.index.json"], 3 * scale),
    (index, _load_card, ["model.json"], 4 * scale),
    (tmp_path / "original", _load_med, ["med_config.json", "vit.json"], scale),
  )
  tried, failed = 0, []
  for folder, load, files, count in kinds:
    load(folder)
    for name, case in configs.cases(18, count, folder, files):
      tried += 1
      start = time.monotonic()
      try:
        load(folder)
      except ValueError as error:
        # Files that contradict each other are all named.
        if str(folder) not in str(error) or name not in str(error):
          failed.append(f"{case}: not named in: {error!s:.300}")
        elif len(str(error)) > 1500:
          failed.append(f"{case}: an error of {len(str(error))} characters")
      except BaseException as error:
        failed.append(f"{case}: {error!r:.300}")
      if time.monotonic() - start > SECONDS:
        failed.append(f"{case}: {time.monotonic() - start:.0f} s")
    load(folder)
  hostile.report("configs and vocabularies", tried, failed)


def test_companion_files(tmp_path):
  _check(tmp_path, 2)


@pytest.mark.slow
def test_many_companion_files(tmp_path):
  _check(tmp_path, 100)
