"""Products of layers with their weights in 8-bit floats, for inference.

Activations and weights are rounded to e4m3: a sign, four bits of exponent and
three of mantissa. All else is as in bfloat16: sums, LayerNorm, attention,
embeddings, heads. XLA calls the scaled product of cuBLASLt for this, with the
bias in the same kernel, on NVIDIA GPUs from compute capability 8.9 on.

Weights are rounded once, when a model is loaded, with a scale for each matrix.
It is a power of two, which changes no digit of a float. Activations have no
scale, and saturate: what LayerNorm and GELU give fits into the range of e4m3,
and a scale by their largest value would make a caption depend on the other
images of its batch, and read all activations twice.

Dimensions: D inputs, E outputs of a layer.
"""

import functools
import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from blip_jax.models import stack

log = logging.getLogger(__name__)

# As users ask for it; and what is not a product of layers is computed in.
NAME, ACTIVATIONS = "float8", "bfloat16"
# Of weights and activations, and their largest number.
KIND = jnp.float8_e4m3fn
LARGEST = 448.0
# The parameter next to a `kernel` of KIND.
SCALE = "kernel_scale"

_LEAST_CAPABILITY = (8, 9)
# Of the weights of a matrix that may be rounded to zero. Of normal ones a
# hundred-thousandth is.
_MOST_LOST = 0.01


@jax.custom_vjp
def product(
  x: Float[Array, "... D"], kernel: Float[Array, "D E"], scale: Float[Array, ""]
) -> Float[Array, "... E"]:
  """`x @ (kernel * scale)`, with `x` rounded, in the dtype of `x`.

  Gradients are those without the rounding of `x`; weights have none.
  """
  rounded = jnp.clip(x, -LARGEST, LARGEST).astype(KIND)
  contracted = (((x.ndim - 1,), (0,)), ((), ()))
  out = jax.lax.dot_general(
    rounded, kernel, contracted, preferred_element_type=x.dtype
  )
  return out * scale.astype(x.dtype)


def _forward(x, kernel, scale):
  return product(x, kernel, scale), (kernel, scale)


def _backward(residuals, gradient):
  kernel, scale = residuals
  weights = kernel.astype(gradient.dtype) * scale.astype(gradient.dtype)
  zeros = jnp.zeros_like(kernel), jnp.zeros_like(scale)
  return gradient @ weights.T, *zeros


product.defvjp(_forward, _backward)


def activations(dtype: str) -> str:
  """The dtype of activations of a model that was asked for in some dtype."""
  return ACTIVATIONS if dtype == NAME else dtype


def round_weights(params: Any) -> Any:
  """Parameters with the matrices of layers in KIND, and with their scales.

  Those of the decoder are not rounded, but for its keys and values of images:
  it works on single tokens, with no product that is large enough to pay for
  rounding its input.

  Raises:
    ValueError: a matrix cannot be rounded; says which one, and why.
  """
  return _round(params, ())


def _round(params: Any, path: tuple[str, ...]) -> Any:
  if not isinstance(params, dict):
    return params
  rounded = {
    name: _round(value, (*path, name)) for name, value in params.items()
  }
  if "kernel" in params and _is_large(path):
    rounded["kernel"], rounded[SCALE] = _checked("/".join(path), rounded)
  return rounded


def _is_large(path: tuple[str, ...]) -> bool:
  """Whether a product is of a layer and computed for many tokens at once."""
  if "text_decoder" in path:
    return "crossattention" in path and path[-1] in ("key", "value")
  return any(name in stack.NAMES for name in path)


def _checked(name: str, layer: dict[str, Any]) -> tuple[Array, Array]:
  kernel, scale, largest, lost = _rounded(layer["kernel"])
  if not jnp.isfinite(largest):
    raise ValueError(
      f"{name}/kernel: expected finite weights for {NAME}, found {largest}"
    )
  if lost > _MOST_LOST:
    raise ValueError(
      f"{name}/kernel: {lost:.0%} of the weights would be zero in {NAME}, "
      f"because the largest is {largest:.3g}; load with dtype={ACTIVATIONS!r}"
    )
  return kernel, scale


@jax.jit
def _rounded(kernel: Float[Array, "N D E"]) -> tuple[Array, ...]:
  """Stacked matrices in KIND, and their scales; then, of all of them, the
  largest weight and the share of weights that are lost."""
  largest = jnp.abs(kernel).max(axis=(1, 2))
  _, exponent = jnp.frexp(largest / LARGEST)
  scale = jnp.ldexp(jnp.ones_like(largest), exponent)
  rounded = (kernel / scale[:, None, None]).astype(KIND)
  lost = (rounded == 0) & (kernel != 0)
  return rounded, scale, largest.max(), lost.mean(axis=(1, 2)).max()


def is_used(params: Any) -> bool:
  """Whether these parameters are from `round_weights`."""
  return any(x.dtype == KIND for x in jax.tree.leaves(params))


def check_device(device: Any) -> None:
  """Says once if a device only emulates such products.

  Raises:
    ValueError: it is an accelerator without them.
  """
  if device.platform == "cpu":
    _say_emulated()
    return
  capability = str(getattr(device, "compute_capability", ""))
  version = re.fullmatch(r"(\d+)\.(\d+)", capability)
  if not version or tuple(map(int, version.groups())) < _LEAST_CAPABILITY:
    least = "{}.{}".format(*_LEAST_CAPABILITY)
    found = device.device_kind + (f" of {capability}" if capability else "")
    raise ValueError(
      f"dtype {NAME!r}: expected an NVIDIA GPU of compute capability {least} "
      f"or more (Ada, Hopper, Blackwell), found {found}; use {ACTIVATIONS!r}"
    )


@functools.cache
def _say_emulated() -> None:
  log.warning(
    "dtype %r: a CPU emulates it, more slowly than 'float32'. Use it here only "
    "to see what it changes.",
    NAME,
  )
