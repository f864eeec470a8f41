"""Layers that both towers are built from.

Dimensions: B query sequences, I key sequences (B is a multiple of I), L
queries, N keys, H heads, d head width, D model width, E width of the key input.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import spmd
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from blip_jax.models import float8, fused_attention, initial

# The collection of variables with masks of dropout.
MASKS = "masks"
# That with factors of attention probabilities, [I, H, Q, N] of a layer. Where
# there are none, they are ones. Their gradients are what saliency is made of.
GATES = "gates"

# Keys and values of one attention layer.
KV = tuple[Float[Array, "I N H d"], Float[Array, "I N H d"]]


def torch_init(fan_in: int) -> nn.initializers.Initializer:
  """PyTorch's default for kernels and biases of linear layers."""
  return initial.uniform(fan_in**-0.5)


def torch_dense(
  features: int, fan_in: int, name: str | None = None
) -> nn.Dense:
  """A linear head with PyTorch's default initialisation.

  Computes in float32 whatever the dtype of the towers is, because its output
  goes directly into a loss.
  """
  return nn.Dense(
    features,
    kernel_init=torch_init(fan_in),
    bias_init=torch_init(fan_in),
    name=name,
  )


class Dense(nn.Module):
  """A linear layer, whose kernel may be one of `float8.round_weights`."""

  features: int
  dtype: str
  init_std: float

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
    normal = initial.normal(self.init_std)
    kernel = self.param("kernel", normal, (x.shape[-1], self.features))
    bias = self.param("bias", initial.zeros, (self.features,))
    x = x.astype(self.dtype)
    if self.has_variable("params", float8.SCALE):
      scale = self.get_variable("params", float8.SCALE)
      y = float8.product(x, kernel, scale)
    else:
      y = x @ kernel.astype(self.dtype)
    return y + bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def normal_dense(features: int, config, name: str | None = None) -> Dense:
  """A linear layer whose weights start from a normal distribution.

  `config` gives `dtype` and `init_std`.  timm's truncated normal truncates at
  the absolute values +-2, 100 standard deviations, so it is a plain normal;
  BERT does not truncate either.
  """
  return Dense(features, config.dtype, config.init_std, name=name)


def layer_norm(
  epsilon: float, dtype: str, name: str | None = None
) -> nn.Module:
  """LayerNorm that subtracts the mean first.

  E[x^2] - E[x]^2 suffers from cancellation, which an epsilon as small as BERT's
  does not hide.
  """
  return nn.LayerNorm(
    epsilon=epsilon,
    dtype=dtype,
    use_fast_variance=False,
    scale_init=initial.ones,
    bias_init=initial.zeros,
    name=name,
  )


def pad(x: Array, axis: int, multiple: int) -> Array:
  """Appends zeros up to a multiple of a length, in half precision only.

  Accelerators compute products of float32 in other ways, for which it makes no
  difference.
  """
  missing = -x.shape[axis] % multiple
  if x.dtype.itemsize > 2 or not missing:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, missing)
  return jnp.pad(x, widths)


def scores(equation: str, x: Array, y: Array) -> Array:
  """An einsum of two arrays in float32, whatever these are.

  Their gradients are products in their own dtype: those of float32 arrays take
  8 to 16 times as long as those of half precision.
  """
  return _scores(equation, x, y)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(equation, x, y):
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _scores_fwd(equation, x, y):
  return _scores(equation, x, y), (x, y)


def _scores_bwd(equation, residuals, gradient):
  x, y = residuals
  _, backward = jax.vjp(functools.partial(jnp.einsum, equation), x, y)
  return backward(gradient.astype(x.dtype))


_scores.defvjp(_scores_fwd, _scores_bwd)


def gelu(x: Array) -> Array:
  """GELU by the error function, as PyTorch computes it.

  `jax.nn.gelu` uses its complement, which takes more than twice as long.
  """
  wide = x.astype(jnp.float32)
  return (0.5 * wide * (1 + jax.lax.erf(wide * 2**-0.5))).astype(x.dtype)


def identity(x: Array) -> Array:
  return x


def dot_product_attention(
  query: Float[Array, "B L H d"],
  key: Float[Array, "I N H d"],
  value: Float[Array, "I N H d"],
  bias: Float[Array, "#I 1 #Q N"] | None = None,
  drop: Callable[[Array], Array] = identity,
) -> Float[Array, "B L H d"]:
  """Scaled dot-product attention, with scores and softmax in float32.

  If B = m * I, the query sequences i*m .. i*m + m-1 share the key sequence i.
  They are folded into the query axis, so that keys are read once and never
  copied; `bias` must then be the same for all of their queries, or cover the
  folded axis Q = m * L.

  Args:
    query: queries.
    key: keys.
    value: values.
    bias: added to the scores, for example to mask keys.
    drop: dropout of the attention probabilities.
  """
  shape = query.shape
  query = query.reshape(key.shape[0], -1, *shape[2:])
  # Heads before positions: otherwise a CPU takes twice as long.
  query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
  logits = scores("bhld,bhnd->bhln", query, key) * (shape[-1] ** -0.5)
  if bias is not None:
    logits = logits + bias
  weights = drop(jax.nn.softmax(logits, axis=-1)).astype(value.dtype)
  heads = jnp.einsum("bhln,bhnd->bhld", weights, value)
  return heads.transpose(0, 2, 1, 3).reshape(shape)


class Attention(nn.Module):
  """Multi-head attention to keys and values that the caller provides.

  Because `key_value` is a separate method, the keys and values of an image are
  computed once for all texts that attend to it.
  """

  width: int
  num_heads: int
  dropout: float
  init_std: float
  dtype: str

  def setup(self):
    dense = lambda: normal_dense(self.width, self)
    self.query = dense()
    self.key = dense()
    self.value = dense()
    self.out = dense()
    self.drop = Dropout(self.dropout)

  def key_value(self, states: Float[Array, "I N E"]) -> KV:
    """Keys and values of the states to attend to."""
    return self._heads(self.key(states)), self._heads(self.value(states))

  def __call__(
    self,
    x: Float[Array, "B L D"],
    kv: KV,
    bias: Float[Array, "#I 1 #Q N"] | None = None,
    deterministic: bool = True,
  ) -> Float[Array, "B L D"]:
    def drop(weights):
      weights = self.drop(weights, deterministic=deterministic)
      gate = self.get_variable(GATES, "gate")
      return weights if gate is None else weights * gate

    heads = dot_product_attention(self._heads(self.query(x)), *kv, bias, drop)
    return self._merged(heads)

  def fused(
    self, x: Float[Array, "B N D"], length: int, kind: str
  ) -> Float[Array, "B N D"]:
    """Attention of `x` to its first `length` tokens by one kernel; see
    `fused_attention.attend`."""
    query, kv = self._heads(self.query(x)), self.key_value(x)
    return self._merged(fused_attention.attend(kind, query, *kv, length))

  def _merged(self, heads: Float[Array, "B L H d"]) -> Float[Array, "B L D"]:
    return self.out(heads.reshape((*heads.shape[:2], self.width)))

  def _heads(self, x: Float[Array, "B N D"]) -> Float[Array, "B N H d"]:
    # A plain Dense and a reshape: DenseGeneral's 3-D kernels break sharding
    # constraints, while 2-D kernels are simply the published weights
    # transposed.
    return x.reshape(*x.shape[:2], self.num_heads, -1)


class Dropout(nn.Module):
  """Drops elements, and scales the others, by the masks of the layer.

  All masks of a pass are sampled together, see `sample_masks`: a random
  generator costs compile time at every place that calls it.
  """

  rate: float

  @nn.compact
  def __call__(self, x: Array, deterministic: bool) -> Array:
    if deterministic or not self.rate:
      return x
    keep = self.variable(MASKS, "keep", jnp.ones, x.shape, bool).value
    return drop(x, keep, self.rate)


def drop(x: Array, keep: Bool[Array, "..."], rate: Any) -> Array:
  """Zeros where `keep` is false; the others are divided by 1 - rate."""
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def keep_mask(
  key: PRNGKeyArray, rate: float, shape: tuple[int, ...]
) -> Bool[Array, "..."]:
  """Samples which elements dropout keeps."""
  bits = jax.random.bits(key, shape, jnp.uint32)
  return bits >= jnp.uint32(rate * 2**32)


def sample_masks(
  key: PRNGKeyArray, rate: float, depth: int, apply: Callable[[], Any]
) -> Any:
  """Samples the masks of all layers of a stack at once.

  Args:
    key: of the pass.
    rate: of dropout.
    depth: number of layers.
    apply: applies one layer, with MASKS as a mutable collection; is traced, and
      not computed.

  Returns:
    The collection MASKS of the layers, stacked.
  """
  masks = jax.eval_shape(apply)[1][MASKS]
  leaves, tree = jax.tree.flatten(masks)
  # Some have a row for every text, and some one for every image.
  rows = min(leaf.shape[0] for leaf in leaves)
  sizes = [leaf.size // rows for leaf in leaves]
  keep = keep_mask(key, rate, (depth, rows, sum(sizes)))
  keep = spmd.with_logical_constraint(keep, (None, "batch", None))
  parts = jnp.split(keep, np.cumsum(sizes)[:-1].tolist(), axis=-1)
  return jax.tree.unflatten(
    tree,
    [
      part.reshape(depth, *leaf.shape)
      for part, leaf in zip(parts, leaves, strict=True)
    ],
  )


def remat(layer: Callable, policy: str) -> Callable:
  """Lets the backward pass of a layer recompute its activations.

  Args:
    layer: a function of arrays.
    policy: `none` recomputes nothing, `dots` keeps the outputs of matrix
      products with weights, `full` keeps only the input of the layer.
  """
  if policy == "none":
    return layer
  saveable = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
  }
  return jax.checkpoint(layer, policy=saveable[policy], prevent_cse=False)
