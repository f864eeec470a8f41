"""Writes a checkpoint in the native, Hugging Face's or the original's layout.

A folder gets its final name once it is complete.
"""

import json
import logging
import os
import pathlib

import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from blip_jax.convert import (
  adapt,
  companions,
  model_configs,
  names,
  tensor_files,
  weights,
)
from blip_jax.convert.opening import Checkpoint
from blip_jax.convert.weights import Leaf, Leaves
from blip_jax.models import card as card_lib
from blip_jax.models import config as model_config
from blip_jax.runtime import digests, files, lock, saved_items, sharding
from blip_jax.tasks import momentum

log = logging.getLogger(__name__)

LAYOUTS = ("orbax", "hf", "original")

# Classes of transformers, by model family.
HF_CLASSES = {
  "caption": "BlipForConditionalGeneration",
  "vqa": "BlipForQuestionAnswering",
  "itm": "BlipForImageTextRetrieval",
}


def write(
  checkpoint: Checkpoint, path: str | os.PathLike, layout: str
) -> pathlib.Path:
  """Writes weights with their config, vocabulary and preprocessing.

  Args:
    checkpoint: what to write; except for the layout "orbax", a few arrays are
      in memory at a time.
    path: a new folder. With the layout "original" it may be a new .pth file
      instead, for the weights alone.
    layout: one of LAYOUTS.

  Returns:
    The path.

  Raises:
    ValueError: the path exists, or another process writes there, or the layout
      has no such model, or none whose images are not square.
  """
  path = pathlib.Path(path)
  if layout not in LAYOUTS:
    raise ValueError(f"layout: expected one of {LAYOUTS}, found {layout!r}")
  if path.suffix == ".pth" and layout != "original":
    raise ValueError(
      f"{path}: expected a folder for --layout {layout}; only --layout "
      "original can be a .pth file"
    )
  height, width = checkpoint.card.config.vit.image_size
  if height != width and layout != "orbax":
    raise ValueError(
      f"{path}: the model's images have {height} x {width} pixels, and only "
      "the layout of this project has models whose images are not square; use "
      "--layout orbax"
    )
  with lock.hold(lock.path_for(path)):
    if files.exists(path):
      raise ValueError(f"{path} exists already; give another path, or move it")
    if path.suffix == ".pth":
      _save_pth(path, checkpoint)
      _warn_of_missing(path, checkpoint.card)
    else:
      _write_folder(checkpoint, path, layout)
    if layout != "orbax":
      _warn_of_decoding(path, checkpoint.card, layout)
  return path


def _write_folder(
  checkpoint: Checkpoint, path: pathlib.Path, layout: str
) -> None:
  temporary = files.temporary_path(path)
  try:
    _WRITERS[layout](checkpoint, temporary)
    files.rename(temporary, path)
  finally:
    files.remove_folder(temporary)


def _write_orbax(checkpoint: Checkpoint, folder: pathlib.Path) -> None:
  mesh = sharding.one_device()
  texts = companions.model_files(checkpoint.card, checkpoint.tokenizer)
  items = {
    "params": checkpoint.on_mesh("params", mesh),
    "model": saved_items.FilesItem(texts),
  }
  momentum_state = checkpoint.on_mesh("momentum", mesh)
  if momentum_state is not None:
    items["momentum"] = momentum.Momentum(**momentum_state)
  # Compressing weights saves little, and takes time and another copy in memory;
  # so does OCDBT, one database for all arrays. Without OCDBT, Orbax warns that
  # arrays in zarr 3 have no data.
  context = ocp.Context()
  context.array.saving.use_compression = False
  context.array.saving.use_ocdbt = False
  context.array.saving.use_zarr3 = False
  with context:
    ocp.save_checkpointables(epath.Path(files.absolute(folder)), items)
  digests.write(folder)
  digests.complete(folder)


def _write_original(checkpoint: Checkpoint, folder: pathlib.Path) -> None:
  files.make_folder(folder)
  _save_pth(folder / "model.pth", checkpoint)
  config = checkpoint.card.config
  configs = {"med_config.json": _med_config(config), "vit.json": _vit(config)}
  _write_files(folder, checkpoint, configs)


def _write_hf(checkpoint: Checkpoint, folder: pathlib.Path) -> None:
  card = checkpoint.card
  if card.family not in HF_CLASSES:
    raise ValueError(
      f"transformers has no class for a {card.family} model; convert it to one "
      f"of {sorted(HF_CLASSES)} with --task (task=)"
    )
  vit, med = card.config.vit, card.config.med
  if card.family == "vqa" and vit.width != med.width:
    raise ValueError(
      "transformers cannot hold this model: its answer decoder expects states "
      f"as wide as image tokens ({vit.width}), but question states have width "
      f"{med.width}"
    )
  files.make_folder(folder)
  external = weights.to_external(checkpoint.leaves, "hf")
  tensor_files.save_safetensors(
    folder / "model.safetensors",
    {name: leaf.read for name, leaf in external.items()},
    {name: leaf.shape for name, leaf in external.items()},
  )
  configs = {"config.json": _hf_config(card)}
  if card.family != "itm":
    tokens = med.tokens
    configs["generation_config.json"] = {
      "bos_token_id": tokens.dec,
      "eos_token_id": tokens.sep,
      "pad_token_id": tokens.pad,
      **card.generation,
    }
  _write_files(folder, checkpoint, configs)


_WRITERS = {
  "orbax": _write_orbax,
  "hf": _write_hf,
  "original": _write_original,
}


def _write_files(
  folder: pathlib.Path, checkpoint: Checkpoint, configs: dict[str, dict]
) -> None:
  """Writes companion files, with `configs` in place of `model.json`."""
  texts = companions.model_files(checkpoint.card, checkpoint.tokenizer)
  del texts["model.json"]
  for name, config in configs.items():
    texts[name] = json.dumps(config, indent=2) + "\n"
  for name, text in texts.items():
    files.write_text(folder / name, text)


def _save_pth(path: pathlib.Path, checkpoint: Checkpoint) -> None:
  tensors, ties = original_state(checkpoint.leaves, checkpoint.card.family)
  tensor_files.save_torch(
    path, {n: leaf.read for n, leaf in tensors.items()}, ties
  )


def _warn_of_missing(path: pathlib.Path, card: card_lib.Card) -> None:
  """Says what a file of weights alone does not tell those who load it."""
  vit, med = card.config.vit, card.config.med
  if med.vocab_size != model_configs.BERT_VOCAB:
    log.warning(
      "%s: the model's vocabulary of %d tokens is not in this file; keep it, "
      "and give its folder when you load the file (tokenizer=), or write a "
      "folder instead",
      path,
      med.vocab_size,
    )
  if any(
    tower.width not in model_configs.PUBLISHED_WIDTHS
    or tower.num_heads * model_configs.HEAD_WIDTH != tower.width
    for tower in (vit, med)
  ):
    log.warning(
      "%s: the numbers of attention heads, %d and %d, are not in this file; "
      "give a config when you load it (model_config=), or write a folder "
      "instead",
      path,
      vit.num_heads,
      med.num_heads,
    )


def _warn_of_decoding(
  path: pathlib.Path, card: card_lib.Card, layout: str
) -> None:
  """Says how this model generates, where those of a layout do otherwise."""
  lost: dict[str, object] = {}
  if card.prompt != card_lib.prompt_of(card.family, layout):
    lost["prompt"] = card.prompt
  if layout == "original":
    usual = card_lib.GENERATION.get(card.family, {})
    lost |= {
      name: value
      for name, value in card.generation.items()
      if usual.get(name) != value
    }
  if lost:
    log.warning(
      "%s: this layout has no place for %s: give %s again when the model "
      "generates, or write the layout orbax",
      path,
      ", ".join(f"{name}={value!r}" for name, value in lost.items()),
      "it" if len(lost) == 1 else "them",
    )


def original_state(
  leaves: Leaves, family: str
) -> tuple[Leaves, dict[str, str]]:
  """The state dict of the original.

  It has what only PyTorch saves: position ids, and each tied tensor under all
  of its names.

  Args:
    leaves: native leaves.
    family: of the model.

  Returns:
    Tensors by name, and further names with the name of the tensor they share.
  """
  tensors = weights.to_external(leaves, "original")
  if family == "retrieval" and "queue_ptr" in tensors:
    tensors["ptr_queue"] = tensors.pop("queue_ptr")
  ties = {}
  if family == "pretrain":
    shared = {p: x for p, x in leaves.items() if adapt.is_shared(p)}
    for name in weights.to_external(shared, "original"):
      decoder_name = name.replace("text_encoder.", "text_decoder.bert.", 1)
      ties[decoder_name] = name
  for name, target in names.TIED.items():
    if target in tensors or target in ties:
      ties[name] = ties.get(target, target)
  positions = ".embeddings.position_embeddings.weight"
  for name in [n for n in (*tensors, *ties) if n.endswith(positions)]:
    number = tensors[ties.get(name, name)].shape[0]
    tower = name.removesuffix(positions)
    ids = Leaf.from_array(np.arange(number)[None])
    tensors[f"{tower}.embeddings.position_ids"] = ids
  return tensors, ties


def _med_config(config: model_config.BlipConfig) -> dict:
  med = config.med
  return {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": med.dropout,
    "hidden_act": "gelu",
    "hidden_dropout_prob": med.dropout,
    "hidden_size": med.width,
    "initializer_range": 0.02,
    "intermediate_size": med.mlp_dim,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": med.max_positions,
    "model_type": "bert",
    "num_attention_heads": med.num_heads,
    "num_hidden_layers": med.depth,
    "pad_token_id": med.tokens.pad,
    "type_vocab_size": 2,
    "vocab_size": med.vocab_size,
    "encoder_width": med.width,
    "add_cross_attention": True,
  }


def _vit(config: model_config.BlipConfig) -> dict:
  vit = config.vit
  return {
    "image_size": vit.image_size[0],
    "patch_size": vit.patch_size,
    "embed_dim": vit.width,
    "depth": vit.depth,
    "num_heads": vit.num_heads,
  }


def _hf_config(card: card_lib.Card) -> dict:
  vit, med = card.config.vit, card.config.med
  tokens = med.tokens
  return {
    "architectures": [HF_CLASSES[card.family]],
    "model_type": "blip",
    "image_text_hidden_size": card.config.embed_dim,
    "label_smoothing": 0.1,
    "tie_word_embeddings": True,
    "vision_config": {
      "model_type": "blip_vision_model",
      "attention_dropout": 0.0,
      "hidden_act": "gelu",
      "hidden_size": vit.width,
      "image_size": vit.image_size[0],
      "intermediate_size": vit.mlp_dim,
      "layer_norm_eps": 1e-6,
      "num_attention_heads": vit.num_heads,
      "num_hidden_layers": vit.depth,
      "patch_size": vit.patch_size,
    },
    "text_config": {
      "model_type": "blip_text_model",
      "attention_probs_dropout_prob": med.dropout,
      "bos_token_id": tokens.dec,
      "encoder_hidden_size": vit.width,
      "eos_token_id": tokens.sep,
      "hidden_act": "gelu",
      "hidden_dropout_prob": med.dropout,
      "hidden_size": med.width,
      "intermediate_size": med.mlp_dim,
      "is_decoder": True,
      "label_smoothing": 0.1,
      "layer_norm_eps": 1e-12,
      "max_position_embeddings": med.max_positions,
      "num_attention_heads": med.num_heads,
      "num_hidden_layers": med.depth,
      "pad_token_id": tokens.pad,
      "sep_token_id": tokens.sep,
      "vocab_size": med.vocab_size,
    },
  }
