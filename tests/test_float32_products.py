"""Products of float32 arrays are slow on accelerators: bfloat16 recipes have
hardly any."""

import collections
import itertools
import math

import jax
import numpy as np

from blip_jax import build, train
from blip_jax.data import tokenizer
from blip_jax.runtime import sharding
from blip_jax.tasks import pretrain


def flops_by_dtype(jaxpr, times=1):
  """FLOPs of all matrix products, by the widest dtype of their operands."""
  found = collections.Counter()
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      x, y = (operand.aval for operand in equation.invars)
      (contracted, _), _ = equation.params["dimension_numbers"]
      size = math.prod(x.shape[i] for i in contracted)
      (out,) = (result.aval for result in equation.outvars)
      dtype = max(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
      found[dtype.name] += 2 * times * size * math.prod(out.shape)
    inner = times * equation.params.get("length", 1)
    for value in jax.tree.leaves(
      equation.params, is_leaf=lambda x: hasattr(x, "eqns")
    ):
      value = getattr(value, "jaxpr", value)
      if hasattr(value, "eqns"):
        found.update(flops_by_dtype(value, inner))
  return found


def test_products_of_a_training_step(tmp_path):
  # As many tokens as BERT has: with [DEC] and [ENC] no multiple of 8.
  special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  words = map("".join, itertools.product("abcdefghijklmnopqrst", repeat=4))
  words = [*special, *itertools.islice(words, 30522 - len(special))]
  (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
  vocabulary = tokenizer.Tokenizer.load(tmp_path)
  assert vocabulary.vocab_size == 30524
  config = pretrain.defaults()
  config.batch_size, config.optim.steps_per_epoch = 128, 1000
  config.num_steps = 1000
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  run = build.build(config, mesh, vocabulary)
  size, length = run.task.model.config.vit.image_size[0], config.data.max_length
  image = jax.ShapeDtypeStruct((128, size, size, 3), np.uint8)
  text = jax.ShapeDtypeStruct((128, length), np.int32)
  batch = {"image": image, "input_ids": text, "attention_mask": text}
  step = train.make_train_step(run.task, run.optimiser[0], 0)
  with sharding.activate(mesh):
    jaxpr = jax.make_jaxpr(step)(run.abstract_state(), batch, 0).jaxpr
  flops = flops_by_dtype(jaxpr)
  # Seven passes of towers, three of which have gradients.
  assert flops["bfloat16"] > 25e12
  assert flops["float32"] / flops.total() < 1e-3
