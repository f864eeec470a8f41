"""What `blip_jax.load` returns: a model with its weights and its vocabulary."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.convert import source
from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.models import card as card_lib
from blip_jax.models import families, med
from blip_jax.runtime import sharding

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Model:
  """A model that is ready to be used.

  Attributes:
    card: its family and sizes, prompt and generation defaults.
    module: the Flax module; its methods say what can be asked of it.
    params: on the mesh, as the module takes them.
    tokenizer: None where no vocabulary was found; `load` warns then.
    mesh: where the parameters are.
  """

  card: card_lib.Card
  module: nn.Module
  params: med.Params
  tokenizer: tokenizer_lib.Tokenizer | None
  mesh: jax.sharding.Mesh

  def apply(self, *args, method: str | None = None, **kwargs) -> Any:
    """Calls a method of the module, without dropout, with these parameters.

    Takes NumPy's arrays as well as JAX's.
    """
    args, kwargs = jax.tree.map(
      lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x,
      (args, kwargs),
    )
    return self.module.apply(
      {"params": self.params}, *args, method=method, **kwargs
    )


def load(
  name_or_path: str | os.PathLike,
  *,
  task: str | None = None,
  image_size: int | None = None,
  dtype: str = "float32",
  mesh: jax.sharding.Mesh | None = None,
  model_config: str | os.PathLike | None = None,
  tokenizer: str | os.PathLike | None = None,
  drop: Sequence[str] = (),
) -> Model:
  """Loads a released checkpoint, one of yours, or one of Hugging Face's.

  Args:
    name_or_path: "model_base_retrieval_coco", "Salesforce/blip-vqa-base", a
      .pth or .safetensors file, a Hugging Face folder, or a workdir of a run.
    task: as what, if not as what it was trained for: "feature", "caption",
      "vqa", "itm", "retrieval", "nlvr" or "pretrain".
    image_size: pixels a side, if not those that it was trained for.
    dtype: of activations, "float32" or "bfloat16"; parameters stay float32.
    mesh: where to put it, from `sharding.make_mesh`; each device reads its own
      part. One device by default.
    model_config: a config file, for weights of widths that BERT and ViT do not
      have.
    tokenizer: a folder with vocab.txt or a hub id, if none lies beside the
      weights.
    drop: regular expressions for names in the file that may be left out.

  Raises:
    ValueError: there is no such checkpoint, or it is damaged or does not fit;
      says which argument helps.
  """
  checkpoint = source.open_checkpoint(
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
  if mesh is None:
    mesh = sharding.one_device()
  card = checkpoint.card
  config = dataclasses.replace(
    card.config,
    vit=dataclasses.replace(card.config.vit, dtype=dtype),
    med=dataclasses.replace(card.config.med, dtype=dtype),
  )
  params = checkpoint.on_mesh("params", mesh)
  if card.family == "pretrain":
    params = med.tie(params)
  return Model(
    card,
    families.build(card.family, config),
    params,
    checkpoint.tokenizer,
    mesh,
  )
