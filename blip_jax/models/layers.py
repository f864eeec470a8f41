"""What both towers are made of.

Dimensions: B rows of queries, I rows of keys (B is a multiple of I), L queries,
N keys, H heads, d head width, D model width.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

KV = tuple[Float[Array, "I N H d"], Float[Array, "I N H d"]]

# PyTorch's default for linear layers: uniform within 1/sqrt(fan_in).
torch_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias_init(fan_in: int) -> nn.initializers.Initializer:
  """PyTorch's default for biases, which shares its kernel's bound."""

  def init(key, shape, dtype=jnp.float32):
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def torch_dense(
  features: int, fan_in: int, name: str | None = None
) -> nn.Dense:
  """A head, as PyTorch starts linear layers.

  In float32 whatever the towers compute in: it feeds losses directly.
  """
  return nn.Dense(
    features,
    kernel_init=torch_kernel_init,
    bias_init=torch_bias_init(fan_in),
    name=name,
  )


def normal_dense(features: int, config, name: str | None = None) -> nn.Dense:
  """A linear layer as a tower's config starts it.

  timm cuts its truncated normal at +-2 *absolute*, which is no cut at all;
  BERT never had one.
  """
  return nn.Dense(
    features,
    dtype=config.dtype,
    kernel_init=nn.initializers.normal(config.init_std),
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
  """Attends, with scores and softmax in float32.

  Where B = m * I, rows i*m .. i*m + m-1 of the query share row i of key and
  value.  They are folded into the query axis, so that the keys are read once
  and never copied; `bias` must then be the same for all of their queries.
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
  """Multi-head attention over keys and values that the caller projects.

  Keeping `project` apart lets one projection of an image serve every text that
  looks at it.
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

  def project(self, states: Float[Array, "I N E"]) -> KV:
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
    # constraints, and 2-D kernels are the published weights transposed.
    return x.reshape(*x.shape[:2], self.num_heads, -1)


class DropPath(nn.Module):
  """Drops a residual branch for whole samples (stochastic depth)."""

  rate: float

  @nn.compact
  def __call__(
    self, x: Float[Array, "B ..."], deterministic: bool
  ) -> Float[Array, "B ..."]:
    if deterministic or self.rate == 0:
      return x
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, shape)
    return jnp.where(keep, x / (1 - self.rate), 0)


def remat(
  block: type[nn.Module], policy: str, static_argnum: int
) -> type[nn.Module]:
  """The block, recomputed in the backward pass as `policy` says.

  `dots` keeps the outputs of matrix products with weights, `full` keeps only
  the block's input.  `static_argnum` is the position, counting self, of
  `deterministic`, the one argument that is not an array.
  """
  if policy == "none":
    return block
  saveable = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
  }
  return nn.remat(
    block, policy=saveable[policy], static_argnums=(static_argnum,)
  )
