"""The programs of CapFilt: captioning and matching of a batch of images.

Every process works for itself, with its own devices, so that a plan is of one
of them.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from blip_jax.capfilt import worker
from blip_jax.convert import opening, registry
from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.inference import captioning, scoring
from blip_jax.models import (
  blip,
  decoding,
  families,
  float8,
  flops,
  placement,
  stepwise,
)
from blip_jax.models import card as card_lib
from blip_jax.models import config as model_config
from blip_jax.plan import programs
from blip_jax.plan.programs import Program
from blip_jax.plan.topology import Topology
from blip_jax.runtime import sharding
from blip_jax.runtime.config import Config
from blip_jax.tasks import align

# What a batch is planned with: a web text and a synthetic one of each image,
# of as many tokens as most captions have at most.
TEXTS, TOKENS = 2, 24


@dataclasses.dataclass(frozen=True)
class _Model:
  """A model without weights on a mesh."""

  config: model_config.BlipConfig
  params: Any
  mesh: jax.sharding.Mesh

  def pixels(self, number: int) -> jax.ShapeDtypeStruct:
    shape = (number, *self.config.vit.image_size, 3)
    split = sharding.batch_sharding(self.mesh)
    return jax.ShapeDtypeStruct(shape, np.uint8, sharding=split)


def plan(config: Config, topology: Topology) -> list[Program]:
  """The programs of `config` for a batch, on the devices of one process.

  Raises:
    ValueError: a model is unknown, or the mesh does not fit the devices.
  """
  first = [d for d in topology.devices if d.process_index == 0]
  mesh = sharding.make_mesh(config.mesh, first)
  is_cpu = topology.chip.platform == "cpu"
  dtype = config.dtype or ("float32" if is_cpu else "bfloat16")
  if dtype == float8.NAME:
    raise ValueError(
      f"config.dtype: there are no plans for {dtype!r}, because its speed has "
      f"not been measured; plan for {float8.ACTIVATIONS!r}"
    )
  each = config.per_device_batch_size or worker.default_batch_size(is_cpu)
  number = each * sharding.num_data_shards(mesh)
  found = []
  matcher = _open(config.filter, "itm", dtype, mesh)
  if config.captioner:
    model = _open(config.captioner, "caption", dtype, mesh)
    with sharding.activate(mesh):
      found.append(_captioner(config, model, topology, number))
  with sharding.activate(mesh):
    return found + _filter(matcher, topology, number)


def _open(
  name: str, family: str, dtype: str, mesh: jax.sharding.Mesh
) -> _Model:
  """Sizes of a model: of a released one by its name, else of its files."""
  if released := registry.find(name):
    sizes = model_config.variant(
      released.variant,
      image_size=released.image_size,
      vocab_size=tokenizer_lib.stand_in().vocab_size,
      tokens=model_config.SpecialTokens(),
      dtype=dtype,
    )
  else:
    card, _ = opening.describe(name)
    med = dataclasses.replace(card.config.med, dtype=dtype)
    vit = dataclasses.replace(card.config.vit, dtype=dtype)
    sizes = dataclasses.replace(card.config, med=med, vit=vit)
  vit = placement.place(sizes.vit, [*mesh.devices.flat])
  sizes = dataclasses.replace(sizes, vit=vit)
  # Not while the mesh is active, on which nothing can run.
  params = sharding.abstract_state(families.abstract(family, sizes), mesh)
  return _Model(sizes, params, mesh)


def _captioner(
  config: Config, model: _Model, topology: Topology, number: int
) -> Program:
  module = families.build("caption", model.config)
  prompt = card_lib.PROMPT if config.prompt is None else config.prompt
  ids = np.array(tokenizer_lib.stand_in().prompt_ids(prompt), np.int32)
  options = {k: v for k, v in config.generation.items() if v is not None}
  most = model.config.med.max_positions
  settings = decoding.make({}, len(ids), most, **options)
  decoder = jax.eval_shape(
    lambda params: stepwise.prepare(module, params),
    {"text_decoder": model.params["text_decoder"]},
  )
  whole = NamedSharding(model.mesh, PartitionSpec())
  decoder = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), decoder
  )
  params = {**model.params, **decoder}
  split = sharding.batch_sharding(model.mesh)
  seeds = jax.ShapeDtypeStruct((number,), np.uint32, sharding=split)
  batch = {"pixels": model.pixels(number), "image_seeds": seeds}
  positions = decoding.num_positions_for(settings.max_length, most)
  traced = captioning.generate_captions.trace(
    (module, positions), params, batch, ids, settings, 0
  )
  num_texts = max(settings.num_beams, settings.num_return_sequences)
  length = int(settings.max_length)
  return programs.compile_for(
    model.mesh,
    topology,
    f"captions of at most {length} tokens",
    number,
    traced,
    programs.nbytes((params, batch)),
    number * flops.captioning(model.config, length, num_texts),
    loop_length=length - len(ids),
  )


def _filter(model: _Model, topology: Topology, number: int) -> list[Program]:
  """Encoding of images, and matching of each with its texts."""
  module = blip.Blip(model.config)
  scorer = scoring.Scorer(align.predict_fns(module), model.mesh)
  params, pixels = model.params, model.pixels(number)
  split = sharding.batch_sharding(model.mesh)
  ids = jax.ShapeDtypeStruct((number * TEXTS, TOKENS), np.int32, sharding=split)
  placed = lambda tree: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), tree
  )
  embeds, _ = jax.eval_shape(scorer.image_features, params, pixels)
  embeds = placed(embeds)
  kv = jax.eval_shape(scorer.image_kv, params, embeds)
  kv = _split_kv(kv, number, model.mesh)
  total = flops.filtering(model.config, TOKENS, TEXTS)
  encoding = flops.image(model.config.vit)
  steps = {
    "filter: images": (scorer.image_features, (params, pixels), encoding),
    "filter: keys and values": (scorer.image_kv, (params, embeds), 0),
    "filter: features of texts": (scorer.text_feat, (params, ids, ids), 0),
    f"filter: {TEXTS} texts of {TOKENS} tokens": (
      scorer.match,
      (params, ids, ids, kv),
      total - encoding,
    ),
  }
  found = []
  for name, (function, args, reference) in steps.items():
    more = {"legacy_cls": False} if function is scorer.match else {}
    found.append(
      programs.compile_for(
        model.mesh,
        topology,
        name,
        number,
        function.trace(*args, **more),
        programs.nbytes(args),
        number * reference,
      )
    )
  return found


def _split_kv(kv: Any, number: int, mesh: jax.sharding.Mesh) -> Any:
  """Keys and values, split like the images that they are of."""
  batch = dict(sharding.AXIS_RULES)["batch"]

  def one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    place = x.shape.index(number)
    spec = PartitionSpec(*[None] * place, batch)
    return jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
    )

  return jax.tree.map(one, kv)
