"""How parameters start: a distribution each, sampled together.

A random generator costs compile time at every place that calls it: minutes, if
each of hundreds of arrays does. A module therefore only says how its parameters
start, and `sample` calls the generator twice for all of them.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta
from flax.linen import initializers
from jaxtyping import Array, Float, PRNGKeyArray

NORMAL, UNIFORM, CONSTANT = "normal", "uniform", "constant"


class Start(struct.PyTreeNode, meta.AxisMetadata):
  """A parameter that is not sampled yet.

  Attributes:
    value: zeros of its shape and dtype, or these alone.
    kind: NORMAL with mean 0, UNIFORM around 0, or CONSTANT.
    scale: the standard deviation, half the width of the range, or the constant.
  """

  value: Any
  kind: str = struct.field(pytree_node=False)
  scale: float = struct.field(pytree_node=False)

  def unbox(self) -> Any:
    return self.value

  def replace_boxed(self, val: Any) -> "Start":
    return self.replace(value=val)

  def add_axis(self, index: int, params: dict[Any, Any]) -> "Start":
    return self

  def remove_axis(self, index: int, params: dict[Any, Any]) -> "Start":
    return self


def _initializer(kind: str, scale: float) -> initializers.Initializer:
  return lambda key, shape, dtype=jnp.float32: Start(
    jnp.zeros(shape, dtype), kind, scale
  )


def normal(std: float) -> initializers.Initializer:
  """A normal distribution around 0."""
  return _initializer(NORMAL, std)


def uniform(bound: float) -> initializers.Initializer:
  """The uniform distribution on [-bound, bound)."""
  return _initializer(UNIFORM, bound)


def constant(value: float) -> initializers.Initializer:
  return _initializer(CONSTANT, value)


zeros, ones = constant(0.0), constant(1.0)


def shapes(starts: Any) -> Any:
  """Shapes and dtypes of a tree of `Start`."""
  return jax.tree.map(lambda start: start.value, starts, is_leaf=_is_start)


def sample(starts: Any, rng: PRNGKeyArray) -> Any:
  """Samples the parameters of a tree of `Start`."""
  leaves, tree = jax.tree.flatten(starts, is_leaf=_is_start)
  numbers = {}
  for key, kind in zip(jax.random.split(rng), (NORMAL, UNIFORM), strict=True):
    total = sum(_size(start) for start in leaves if start.kind == kind)
    numbers[kind] = _samples(key, kind, total)
  taken, values = dict.fromkeys(numbers, 0), []
  for start in leaves:
    shape, dtype = start.value.shape, start.value.dtype
    if start.kind == CONSTANT:
      values.append(jnp.full(shape, start.scale, dtype))
      continue
    first = taken[start.kind]
    taken[start.kind] += _size(start)
    sampled = numbers[start.kind][first : taken[start.kind]]
    values.append((start.scale * sampled).reshape(shape).astype(dtype))
  return jax.tree.unflatten(tree, values)


def _samples(
  key: PRNGKeyArray, kind: str, total: int
) -> Float[Array, " total"]:
  if kind == NORMAL:
    numbers = jax.random.normal(key, (total,))
  else:
    numbers = jax.random.uniform(key, (total,), minval=-1.0)
  # Otherwise XLA samples anew for each of the arrays, which costs as much as if
  # they sampled by themselves.
  return jax.lax.optimization_barrier(numbers)


def _is_start(x: Any) -> bool:
  return isinstance(x, Start)


def _size(start: Start) -> int:
  return math.prod(start.value.shape)
