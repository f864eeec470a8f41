"""The programs of a job, compiled for a topology."""

import dataclasses
import functools
import math
import re
import time
from typing import Any

import jax
from jax import stages

from blip_jax import build, context, train
from blip_jax.convert import companions
from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.models import flops
from blip_jax.plan import operations, roofline, traffic
from blip_jax.plan.topology import Topology
from blip_jax.runtime import files, sharding
from blip_jax.runtime.config import Config

# What the compilers of TPUs and GPUs say about a program that is too large.
_TOO_LARGE = re.compile(
  r"(?i)(?:used|total hbm usage >?=?|allocating|requires?) *:?\s*([\d.]+)\s*"
  r"([KMGT])i?B?"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    name: of it.
    items: images of a call, over all devices.
    arguments: bytes of a device for what is there between calls.
    temporary: bytes of a device for everything else; None if the compiler only
      says that it is too large.
    flops: of its products, per device.
    reference_flops: of the reference algorithm, per device; 0 if unknown.
    counts: what it moves.
    times: predicted.
    seconds: that the compiler took.
    note: what the compiler says of a program that does not fit.
    compiled: the program; None if it does not fit.
  """

  name: str
  items: int
  arguments: int
  temporary: int | None
  flops: float
  reference_flops: float
  counts: traffic.Counts | None
  times: roofline.Times | None
  seconds: float
  note: str = ""
  compiled: stages.Compiled | None = None

  @property
  def memory(self) -> int | None:
    """Bytes of a device at the peak."""
    return None if self.temporary is None else self.arguments + self.temporary


def training(config: Config, topology: Topology) -> tuple[Program, Config]:
  """The step of a training.

  Returns:
    The program, and the config with all its values.

  Raises:
    ValueError: the config is wrong, or does not fit the topology.
  """
  config = context.complete(config)
  build.validate(config)
  mesh = build.make_mesh(config, topology.devices)
  # Neither changes the program.
  planned = config.copy_and_resolve_references()
  with planned.unlocked():
    planned.optim.steps_per_epoch = config.optim.steps_per_epoch or 1000
    planned.num_steps = config.num_steps or 1000
  run = build.build(planned, mesh, vocabulary(config))
  state, batch = run.abstract_state(), run.abstract_batch()
  step = train.make_train_step(
    run.task, run.optimiser[0], config.seed, config.grad_accum_steps
  )
  reference = 0
  if config.task == "pretrain":
    reference = config.batch_size * flops.pretraining(
      run.task.model.config,
      config.data.max_length,
      config.pretrain.queue_size,
    )
  with sharding.activate(mesh):
    program = compile_for(
      mesh,
      topology,
      "training step",
      config.batch_size,
      step.trace(state, batch, 0),
      nbytes((state, batch)),
      reference,
    )
  return program, config


def vocabulary(config: Config) -> tokenizer_lib.Tokenizer:
  """The tokenizer of a config; one as large as BERT's stands for one that is
  not on this machine, because no text is read."""
  name = config.tokenizer or companions.BERT
  if name == "scenes" or files.is_folder(name):
    return build.load_tokenizer(config)
  return tokenizer_lib.stand_in()


def compile_for(
  mesh: jax.sharding.Mesh,
  topology: Topology,
  name: str,
  items: int,
  traced: stages.Traced,
  arguments: int,
  reference_flops: int = 0,
  loop_length: int = 1,
) -> Program:
  """Compiles a program, and counts what it does.

  Args:
    mesh: its devices, some of the topology.
    topology: what they are.
    name: of the program.
    items: images of a call.
    traced: the program.
    arguments: bytes of its arguments per device.
    reference_flops: see `Program`, but over all devices.
    loop_length: of loops whose length the program does not say.
  """
  number = mesh.devices.size
  each = operations.flops(traced.jaxpr.jaxpr, loop_length) / number
  make = functools.partial(
    Program,
    name=name,
    items=items,
    flops=each,
    reference_flops=reference_flops / number,
  )
  begin = time.monotonic()
  try:
    compiled = traced.lower().compile(topology.compiler_options or None)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return make(
      arguments=arguments,
      temporary=None,
      counts=None,
      times=None,
      seconds=time.monotonic() - begin,
      note=_too_large(str(error)),
    )
  seconds = time.monotonic() - begin
  analysis: Any = compiled.memory_analysis()
  counts = traffic.count(
    compiled.as_text() or "", topology.chip.platform, loop_length
  )
  # Outputs that replace arguments need nothing of their own.
  temporary = analysis.temp_size_in_bytes
  temporary += analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  if topology.chip.platform == "cpu":
    # Its library for products copies their operands, uncounted by XLA; two
    # products may run at a time.
    temporary += 2 * counts.largest_operands
  return make(
    arguments=analysis.argument_size_in_bytes,
    temporary=temporary,
    counts=counts,
    times=roofline.times(topology.chip, topology.per_host, each, counts),
    seconds=seconds,
    compiled=compiled,
  )


def _too_large(message: str) -> str:
  first = " ".join(message.split())[:160]
  found = _TOO_LARGE.search(message)
  return f"{found[0]}" if found else first


def nbytes(tree: Any) -> int:
  """Of abstract arrays on one device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )
