"""Writes a checkpoint for others: Orbax for us, Hugging Face, the original.

A folder appears under its name when it is whole.
"""

import json
import os
import pathlib
import shutil

import numpy as np
from orbax.checkpoint import v1 as ocp

from blip_jax.convert import (
  adapt,
  companions,
  names,
  tensor_files,
  weights,
)
from blip_jax.convert.opening import Checkpoint
from blip_jax.convert.weights import Leaf, Leaves
from blip_jax.models import config as model_config
from blip_jax.runtime import sharding, snapshot
from blip_jax.tasks import momentum

LAYOUTS = ("orbax", "hf", "original")

# The families that transformers has a class for.
HF_CLASSES = {
  "caption": "BlipForConditionalGeneration",
  "vqa": "BlipForQuestionAnswering",
  "itm": "BlipForImageTextRetrieval",
}


def write(
  checkpoint: Checkpoint, path: str | os.PathLike, layout: str
) -> pathlib.Path:
  """Writes weights, and beside them config, vocabulary and preprocessing.

  Args:
    checkpoint: what to write; read one array at a time where the layout allows.
    path: a new folder; with the layout "original" also a new .pth file, which
      then has the weights alone, for the original has the rest in its code.
    layout: one of LAYOUTS.

  Raises:
    ValueError: something is there already, or the layout has no such model.
  """
  path = pathlib.Path(path)
  if layout not in LAYOUTS:
    raise ValueError(f"layout: expected one of {LAYOUTS}, found {layout!r}")
  if path.exists():
    raise ValueError(
      f"{path} is there already; name another, or move it away first"
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == ".pth":
    if layout != "original":
      raise ValueError(
        f"{path}: only --layout original is a .pth file; {layout} is a folder"
      )
    _save_pth(path, checkpoint)
    return path
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    _WRITERS[layout](checkpoint, temporary)
    temporary.rename(path)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return path


def _write_orbax(checkpoint: Checkpoint, folder: pathlib.Path) -> None:
  mesh = sharding.one_device()
  files = companions.model_files(checkpoint.card, checkpoint.tokenizer)
  items = {
    "params": checkpoint.on_mesh("params", mesh),
    "model": snapshot.FilesItem(files),
  }
  twin = checkpoint.on_mesh("momentum", mesh)
  if twin is not None:
    items["momentum"] = momentum.Momentum(**twin)
  # Weights hardly shrink, and to try takes time and as much memory again; one
  # database of all arrays takes another copy of them.  (Of arrays in zarr 3
  # that are in none, Orbax warns that there are no data.)
  context = ocp.Context()
  context.array.saving.use_compression = False
  context.array.saving.use_ocdbt = False
  context.array.saving.use_zarr3 = False
  with context:
    ocp.save_checkpointables(folder.absolute(), items)


def _write_original(checkpoint: Checkpoint, folder: pathlib.Path) -> None:
  folder.mkdir()
  _save_pth(folder / "model.pth", checkpoint)
  config = {"med_config.json": _med_config(checkpoint.card.config)}
  _write_files(folder, checkpoint, config)


def _write_hf(checkpoint: Checkpoint, folder: pathlib.Path) -> None:
  card = checkpoint.card
  if card.family not in HF_CLASSES:
    raise ValueError(
      f"transformers has no class for a {card.family} model; give --task, one "
      f"of {sorted(HF_CLASSES)}, that this checkpoint can become"
    )
  vit, med = card.config.vit, card.config.med
  if card.family == "vqa" and vit.width != med.width:
    raise ValueError(
      "transformers builds the answer decoder for states as wide as image "
      f"tokens ({vit.width}), but it reads questions ({med.width}): it cannot "
      "hold this model"
    )
  folder.mkdir()
  theirs = weights.to_external(checkpoint.leaves, "hf")
  tensor_files.save_safetensors(
    folder / "model.safetensors",
    {name: leaf.read for name, leaf in theirs.items()},
    {name: leaf.shape for name, leaf in theirs.items()},
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
  """What lies beside the weights; `configs` say what our `model.json` says."""
  files = companions.model_files(checkpoint.card, checkpoint.tokenizer)
  del files["model.json"]
  for name, config in configs.items():
    files[name] = json.dumps(config, indent=2) + "\n"
  for name, text in files.items():
    (folder / name).write_text(text, encoding="utf-8")


def _save_pth(path: pathlib.Path, checkpoint: Checkpoint) -> None:
  tensors, ties = original_state(checkpoint.leaves, checkpoint.card.family)
  tensor_files.save_torch(
    path, {n: leaf.read for n, leaf in tensors.items()}, ties
  )


def original_state(
  leaves: Leaves, family: str
) -> tuple[Leaves, dict[str, str]]:
  """The state dict of the original: tensors, and names that share one.

  Adds what only PyTorch keeps: position ids, and tied tensors under every name
  that they have there.
  """
  tensors = weights.to_external(leaves, "original")
  if family == "retrieval" and "queue_ptr" in tensors:
    tensors["ptr_queue"] = tensors.pop("queue_ptr")
  ties = {}
  if family == "pretrain":
    shared = {p: x for p, x in leaves.items() if adapt.is_shared(p)}
    for name in weights.to_external(shared, "original"):
      decoders = name.replace("text_encoder.", "text_decoder.bert.", 1)
      ties[decoders] = name
  for name, twin in names.TIED.items():
    if twin in tensors or twin in ties:
      ties[name] = ties.get(twin, twin)
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


def _hf_config(card) -> dict:
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
