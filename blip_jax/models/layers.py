"""Layers that both towers are built from.

Dimensions: B query sequences, I key sequences (B is a multiple of I), L
queries, N keys, H heads, d head width, D model width, E width of the key input.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from blip_jax.models import initial

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


def normal_dense(features: int, config, name: str | None = None) -> nn.Dense:
  """A linear layer whose weights start from a normal distribution.

  `config` gives `dtype` and `init_std`.  timm's truncated normal truncates at
  the absolute values +-2, 100 standard deviations, so it is a plain normal;
  BERT does not truncate either.
  """
  return nn.Dense(
    features,
    dtype=config.dtype,
    kernel_init=initial.normal(config.init_std),
    bias_init=initial.zeros,
    name=name,
  )


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
  scores = jnp.einsum(
    "blhd,bnhd->bhln", query, key, preferred_element_type=jnp.float32
  )
  scores = scores * (shape[-1] ** -0.5)
  if bias is not None:
    scores = scores + bias
  weights = drop(jax.nn.softmax(scores, axis=-1)).astype(value.dtype)
  return jnp.einsum("bhln,bnhd->blhd", weights, value).reshape(shape)


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
    self.drop = nn.Dropout(self.dropout)

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
    drop = lambda weights: self.drop(weights, deterministic=deterministic)
    heads = dot_product_attention(self._heads(self.query(x)), *kv, bias, drop)
    return self.out(heads.reshape((*x.shape[:2], self.width)))

  def _heads(self, x: Float[Array, "B N D"]) -> Float[Array, "B N H d"]:
    # A plain Dense and a reshape: DenseGeneral's 3-D kernels break sharding
    # constraints, while 2-D kernels are simply the published weights
    # transposed.
    return x.reshape(*x.shape[:2], self.num_heads, -1)


class DropPath(nn.Module):
  """Drops a residual branch for entire examples (stochastic depth)."""

  @nn.compact
  def __call__(
    self, x: Float[Array, "B ..."], rate: Float[Array, ""] | float | None
  ) -> Float[Array, "B ..."]:
    """Drops with this rate; None drops nothing."""
    if rate is None:
      return x
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


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
