"""What the cases share: tolerances, opening checkpoints, and comparing losses
and gradients.
"""

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.convert import opening, weights, write
from blip_jax.models import families, stack
from blip_jax.runtime import saved_arrays
from blip_jax.tasks import base, losses
from blip_jax.tasks import momentum as momentum_lib
from tests import QUICK_COMPILER_OPTIONS
from tests.parity import verdicts
from tests.parity.goldens import Golden

# Tolerances in units of an array's scale, for float32 on a CPU.
EXACT = 0.0
ROUNDING = 1e-6  # weights that were only converted, and pixels
MODULE = 1e-5  # features of one tower, and queues
LOSS = 1e-5  # losses before any parameter has changed
MODEL = 1e-4  # complete models: losses, logits, features and gradients
GRADIENT = 1e-5  # norms and fingerprints, in units of the global norm
STEPPED = 1e-4  # parameters after steps of AdamW, absolute
FLOAT64 = 1e-9  # formulas

# These programs run once or a few times, so that nearly all of the time goes to
# compilation.
jit = functools.partial(jax.jit, compiler_options=QUICK_COMPILER_OPTIONS)
jit_of_model = functools.partial(jit, static_argnums=0)
lm_loss = jit(losses.lm_loss, static_argnums=2)


@contextlib.contextmanager
def recorded(*paths: str) -> Iterator[dict[str, list]]:
  """Collects the outputs of the modules with these paths, call after call.

  Layers of a stack are called one by one if their parameters are taken apart.
  Their paths are without that of the tower, and their own is their class.
  """
  seen = collections.defaultdict(list)

  def record(call, args, kwargs, context):
    out = call(*args, **kwargs)
    path = "/".join(context.module.path) or type(context.module).__name__
    if context.method_name == "__call__" and path in paths:
      seen[path].append(out)
    return out

  with nn.intercept_methods(record):
    yield seen


def tree(leaves: weights.Leaves, prefix: str = "params") -> dict:
  """The arrays below a path, as nested dicts."""
  return saved_arrays.nested(
    {
      path.removeprefix(f"{prefix}/"): jax.device_put(leaf.read())
      for path, leaf in leaves.items()
      if path.startswith(f"{prefix}/")
    }
  )


def state(leaves: weights.Leaves, family: str) -> dict[str, np.ndarray]:
  """The original's state dict; tied tensors have all their names."""
  tensors, ties = write.original_state(leaves, family)
  state = {name: leaf.read() for name, leaf in tensors.items()}
  return state | {name: state[other] for name, other in ties.items()}


def state_of(
  family: str,
  params: dict,
  momentum: momentum_lib.Momentum | None = None,
) -> dict[str, np.ndarray]:
  tree = saved_arrays.by_path({"params": params, "momentum": momentum})
  leaves = {
    path: weights.Leaf.from_array(np.asarray(x)) for path, x in tree.items()
  }
  return state(leaves, family)


class Opened(NamedTuple):
  """A checkpoint with its model and parameters."""

  checkpoint: opening.Checkpoint
  model: nn.Module
  params: dict
  family: str

  @property
  def ties(self) -> dict[str, str]:
    """Name of a tied tensor in the original -> the other name of it."""
    return write.original_state(self.checkpoint.leaves, self.family)[1]

  @classmethod
  def of(cls, checkpoint: opening.Checkpoint) -> "Opened":
    card = checkpoint.card
    model = families.build(card.family, card.config)
    return cls(checkpoint, model, tree(checkpoint.leaves), card.family)


def open_case(golden: Golden) -> Opened:
  """Opens the case's checkpoint and compares its round trip with the file."""
  opened = [golden.open(name) for name in golden.checkpoints]
  for name, checkpoint in zip(golden.checkpoints, opened, strict=True):
    if name.startswith("ckpt/"):
      saved = golden.tensors(name)
      actual = state(checkpoint.leaves, checkpoint.card.family)
      nothing = np.empty(0)
      errors = {
        key: verdicts.difference(
          actual.get(key, nothing), saved.get(key, nothing)
        )
        for key in sorted({*actual, *saved})
      }
      golden.add_check(f"{name} there and back", errors, EXACT)
  return Opened.of(opened[0])


def bound(model: nn.Module, params: dict) -> Callable:
  """Returns `(method, ...) -> output of the method with these parameters`."""
  return lambda method, *args, **kwargs: model.apply(
    {"params": params}, *args, method=method, **kwargs
  )


def loss_fn(task: base.Task, *paths: str, unstack: bool = False) -> Callable:
  """Returns `(params, batch) -> (loss, recorded outputs of the modules)`."""

  def loss(params, batch):
    params = stack.unstack(params) if unstack else params
    with recorded(*paths) as seen:
      value, _ = task.loss(
        params, None, batch, rng=jax.random.key(0), step=jnp.int32(0)
      )
    return value, dict(seen)

  return loss


def compare_loss(
  golden: Golden,
  opened: Opened,
  task: base.Task,
  batch: dict,
  *paths: str,
  unstack: bool = False,
) -> dict[str, list]:
  """Compares a task's loss and gradients; returns the recorded outputs.

  For outputs of modules in layers, `unstack` takes these apart in a forward
  pass of its own: their gradients would take five times as long to compile.
  """
  loss = loss_fn(task, *() if unstack else paths)
  run = jit(jax.value_and_grad(loss, has_aux=True))
  (value, seen), grads = run(opened.params, batch)
  if unstack:
    run = jit(loss_fn(task, *paths, unstack=True))
    _, seen = run(opened.params, batch)
  golden.compare({"loss": value, "loss__f64": value}, LOSS)
  compare_gradients(golden, state_of(opened.family, grads))
  return seen


def compare_gradients(golden: Golden, actual: Mapping[str, np.ndarray]) -> None:
  """Compares gradients by the names of the original.

  The goldens have norms and fingerprints of all gradients, and some whole. The
  scale is at most the norm of all gradients together: a key bias has a true
  gradient of zero, so its own size is that of rounding errors.
  """
  total = np.linalg.norm(golden.input("grad_norm").astype(np.float64))
  names = golden.fact("grad_names")
  golden.compare_fingerprints("grad", names, actual, GRADIENT, lambda x: total)
  zero = golden.fact("zero_grad_params", [])
  groups = {True: {}, False: {}}
  for name, x in actual.items():
    groups[name in zero][f"grad.{name}"] = x
  golden.compare(groups[True], GRADIENT, "grad.* (rounding)", total)
  scale = lambda x: min(np.abs(x).max() or 1.0, total * GRADIENT / MODEL)
  golden.compare(groups[False], MODEL, "grad.*", scale)
