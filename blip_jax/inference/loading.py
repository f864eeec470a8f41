"""`blip_jax.load`: opens a checkpoint for inference."""

import dataclasses
import logging
import os
from collections.abc import Sequence

import jax

from blip_jax.convert import opening
from blip_jax.inference.model import Model
from blip_jax.models import families, float8, placement, tying
from blip_jax.runtime import sharding

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", float8.NAME)


def quick_dtype() -> str:
  """The dtype of activations that is fastest on the default device."""
  # CPUs that lack bfloat16 emulate it, many times slower.
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def load(
  name_or_path: str | os.PathLike,
  *,
  task: str | None = None,
  image_size: int | None = None,
  dtype: str = "float32",
  mesh: jax.sharding.Mesh | int | None = None,
  model_config: str | os.PathLike | None = None,
  tokenizer: str | os.PathLike | None = None,
  drop: Sequence[str] = (),
) -> Model:
  """Loads a model: a released checkpoint, your own, or one of Hugging Face.

  Args:
    name_or_path: the name of a released checkpoint
      ("model_base_retrieval_coco"), a Hugging Face id
      ("Salesforce/blip-vqa-base"), a .pth or .safetensors file, a Hugging Face
      folder, or the workdir of a training run.
    task: what to use it for, if not what it was trained for: "feature",
      "caption", "vqa", "itm", "retrieval", "nlvr", "dialog" or "pretrain".
    image_size: side of the images in pixels, if not that of the checkpoint;
      position embeddings are interpolated.
    dtype: of activations, "float32" or "bfloat16"; parameters stay float32.
      "float8": products of layers are of 8-bit floats, and the rest is as in
      "bfloat16"; for newer NVIDIA GPUs, see docs/scale.md.
    mesh: the devices to use; each reads only its own part of the parameters.
      A number of devices, which share the images of a batch, or a
      `jax.sharding.Mesh` with axes among "data", "fsdp" and "tensor", such as
      `jax.make_mesh((4, 2), ("data", "tensor"))`. One device by default.
    model_config: a JSON file of the model's sizes, for weights whose widths
      differ from those of BERT and ViT.
    tokenizer: a folder with vocab.txt or a Hugging Face id, if there is no
      vocabulary next to the weights.
    drop: regular expressions of tensor names in the file that may be ignored.

  Raises:
    ValueError: there is no such checkpoint, it is damaged, or it does not fit;
      says which argument helps. Or an argument has another value than these.
  """
  if dtype not in DTYPES:
    raise ValueError(f"dtype: expected one of {DTYPES}, found {dtype!r}")
  mesh = sharding.as_mesh(mesh)
  if dtype == float8.NAME:
    float8.check_device(mesh.devices.flat[0])
  activations = float8.activations(dtype)
  checkpoint = opening.open_checkpoint(
    name_or_path,
    task=task,
    image_size=image_size,
    model_config=model_config,
    tokenizer=tokenizer,
    keep_momentum=False,
    drop=drop,
  )
  for warning in checkpoint.report.warnings:
    log.warning("%s: %s", name_or_path, warning)
  card = checkpoint.card
  config = dataclasses.replace(
    card.config,
    vit=placement.place(
      dataclasses.replace(card.config.vit, dtype=activations),
      [*mesh.devices.flat],
    ),
    med=dataclasses.replace(card.config.med, dtype=activations),
  )
  params = checkpoint.on_mesh("params", mesh)
  assert params is not None, name_or_path
  if card.family == "pretrain":
    params = tying.tie(params)
  if dtype == float8.NAME:
    params = float8.round_weights(params)
  return Model(
    dataclasses.replace(card, config=config),
    families.build(card.family, config),
    params,
    checkpoint.tokenizer,
    mesh,
  )
