"""Equal layers, one after another.

Their parameters are stacked: arrays with one axis more, the first, for the
index of the layer. A scan over it compiles one layer in place of twelve, and
the optimiser, the momentum encoders and the mesh have one array in place of
twelve.

A loop over single tokens takes the layers apart before it begins (`unstack`):
otherwise every step would copy the weights of each layer out of the stack.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

# Names of stacks among the parameters.
NAMES = ("blocks", "layers", "merging_layers")

# Parameters of all layers, stacked or as a list.
Layers = Any


def declare(
  module: nn.Module, name: str, size: int, start: Callable[[Any], Any]
) -> None:
  """Makes a stack one of the parameters of a module.

  Args:
    module: what the stack is part of.
    name: of the stack, one of NAMES.
    size: number of layers.
    start: the `init` of a layer with its inputs, of a key.
  """
  if module.has_variable("params", name):
    return

  def stacked(key: Any) -> Any:
    one = jax.eval_shape(start, key)["params"]
    return jax.tree.map(lambda x: jnp.zeros((size, *x.shape), x.dtype), one)

  module.param(name, stacked)


def params(module: nn.Module, name: str) -> Layers:
  """The parameters of a stack, stacked or as a list."""
  return meta.unbox(module.get_variable("params", name))


def run(
  layer: Callable[[Any, Any], tuple[Any, Any]],
  x: Any,
  layers: Layers,
  *per_layer: Any,
) -> tuple[Any, Any]:
  """Applies layers one after another.

  Args:
    layer: (x, (parameters, *inputs) of a layer) -> (x, output).
    x: input of the first layer.
    layers: their parameters.
    *per_layer: further inputs, stacked as the parameters are; None has no
      layers.

  Returns:
    The output `x` of the last layer, and the other outputs, stacked.
  """
  if not isinstance(layers, list):
    return jax.lax.scan(layer, x, (layers, *per_layer))
  outputs = []
  for i, one in enumerate(layers):
    own = (
      inputs[i] if isinstance(inputs, list) else _take(inputs, i)
      for inputs in per_layer
    )
    x, output = layer(x, (one, *own))
    outputs.append(output)
  return x, outputs


def unstack(tree: Any) -> Any:
  """Parameters with lists of layers in place of stacks."""
  if not isinstance(tree, dict):
    return tree
  return {
    name: apart(value) if name in NAMES else unstack(value)
    for name, value in tree.items()
  }


def apart(layers: Layers) -> list[Any]:
  """The layers of a stack, or of a list."""
  if isinstance(layers, list):
    return layers
  return [_take(layers, i) for i in range(depth(layers))]


def first(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
  """What the first layer has of parameters and further inputs of `run`."""
  return tuple(x[0] if isinstance(x, list) else _take(x, 0) for x in inputs)


def _take(layers: Any, i: int) -> Any:
  return jax.tree.map(lambda x: x[i], layers)


def depth(layers: Layers) -> int:
  """The number of layers."""
  if isinstance(layers, list):
    return len(layers)
  return len(jax.tree.leaves(layers)[0])


def like(tree: Any, layers: Layers) -> Any:
  """`tree` once for every layer, stacked if the layers are."""
  if isinstance(layers, list):
    return [tree] * len(layers)
  repeat = lambda x: jnp.broadcast_to(x, (depth(layers), *x.shape))
  return jax.tree.map(repeat, tree)
