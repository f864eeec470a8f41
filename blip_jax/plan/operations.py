"""FLOPs of the products of matrices that a program computes.

Counted in what JAX traces, over all devices: with what a backward pass computes
again, and with the body of a loop as often as it runs.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax


def flops(jaxpr: Any, loop_length: int = 1) -> int:
  """FLOPs of all products; a multiplication with an addition counts twice.

  Args:
    jaxpr: of the program.
    loop_length: of loops whose length the program does not say.
  """
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      total += _dot(equation)
    elif name == "conv_general_dilated":
      total += _convolution(equation)
    elif name.startswith("dot_product_attention"):
      total += _attention(equation)
    elif name == "cond":
      total += max(flops(x.jaxpr, loop_length) for x in params["branches"])
    elif name == "while":
      total += loop_length * flops(params["body_jaxpr"].jaxpr, loop_length)
    else:
      times = params["length"] if name == "scan" else 1
      if name == "pallas_call":
        times = math.prod(params["grid_mapping"].grid)
      if name == "shard_map":
        times = params["mesh"].size
      inner = (flops(each, loop_length) for each in _jaxprs(params))
      total += times * sum(inner)
  return total


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
  is_jaxpr = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
  for value in jax.tree.leaves(params, is_leaf=is_jaxpr):
    value = getattr(value, "jaxpr", value)
    if hasattr(value, "eqns"):
      yield value


def _dot(equation: Any) -> int:
  (contracted, _), _ = equation.params["dimension_numbers"]
  shape = equation.invars[0].aval.shape
  inner = math.prod(shape[i] for i in contracted)
  return 2 * inner * math.prod(equation.outvars[0].aval.shape)


def _convolution(equation: Any) -> int:
  kernel = equation.invars[1].aval.shape
  features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
  out = math.prod(equation.outvars[0].aval.shape)
  return 2 * out * math.prod(kernel) // features


def _attention(equation: Any) -> int:
  """Of cuDNN's kernel: two products, and five in the backward pass."""
  batch, length, heads, width = equation.invars[0].aval.shape
  products = 5 if "bwd" in equation.primitive.name else 2
  keys = equation.invars[1].aval.shape[1]
  return products * 2 * batch * heads * length * keys * width
