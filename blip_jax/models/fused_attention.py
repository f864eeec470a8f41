"""Attention by one kernel that never writes the scores to memory.

For queries, keys and values of the same tokens, in half precision.

Dimensions: B sequences, N tokens, H heads, d head width.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import spmd
from jaxtyping import Array, Float

log = logging.getLogger(__name__)

Heads = Float[Array, "B N H d"]

# The platform that each kernel is for.
_PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}

# The vector registers of a TPU have as many lanes, and the kernel for it wants
# a multiple of them.
_LANES = 128

# With fewer tokens, padding them costs more than the kernel saves: compiled for
# a TPU v5e, a layer and its gradient access 1.6 times as many bytes as without
# the kernel at 197 tokens, and 0.45 times as many at 577.
_MIN_TOKENS_ON_TPU = 512


def attend(
  kind: str, query: Heads, key: Heads, value: Heads, length: int
) -> Heads:
  """Scaled dot-product attention.

  Args:
    kind: cudnn, whose gradient needs an even N, or splash.
    query: queries.
    key: keys.
    value: values.
    length: the number of keys to attend to, which are the first ones.
  """
  return {"cudnn": _cudnn, "splash": _splash}[kind](query, key, value, length)


def choose(kind: str, device: Any, dtype: str, num_tokens: int) -> str:
  """The kind of attention to use, one of `models.config.ATTENTION`.

  Logs what it is if there are others, and why if it is not what was asked for.

  Args:
    kind: what was asked for; empty for the fastest.
    device: what it runs on.
    dtype: of the activations.
    num_tokens: N, of the image tower.
  """
  kind = kind or _fastest(device, dtype, num_tokens)
  return _working(kind, device, dtype) if kind in _PLATFORMS else kind


def _fastest(device: Any, dtype: str, num_tokens: int) -> str:
  if dtype == "float32":
    return "xla"
  if device.platform == "tpu" and num_tokens < _MIN_TOKENS_ON_TPU:
    return "xla"
  kinds = {platform: kind for kind, platform in _PLATFORMS.items()}
  return kinds.get(device.platform, "xla")


@functools.cache
def _working(kind: str, device: Any, dtype: str) -> str:
  """The kind if it compiles, else XLA's."""
  platform = _PLATFORMS[kind]
  try:
    if device.platform != platform:
      raise ValueError(f"it is for the platform {platform!r}")
    x = jax.ShapeDtypeStruct((1, 2, 1, 64), dtype)
    total = lambda x: attend(kind, x, x, x, 2).sum()
    with jax.default_device(device):
      jax.jit(jax.grad(total)).lower(x).compile()
  except Exception as error:  # of JAX, of XLA or of cuDNN
    log.warning(
      "Attention of the image tower: XLA's, for %r does not work on %s in %s: "
      "%s",
      kind,
      device.device_kind,
      dtype,
      str(error).partition("\n")[0],
    )
    return "xla"
  log.info("Attention of the image tower: one kernel, %r", kind)
  return kind


def _cudnn(query: Heads, key: Heads, value: Heads, length: int) -> Heads:
  lengths = jnp.full(key.shape[0], length, jnp.int32)
  return jax.nn.dot_product_attention(
    query, key, value, key_value_seq_lengths=lengths, implementation="cudnn"
  )


def _splash(query: Heads, key: Heads, value: Heads, length: int) -> Heads:
  """By the kernel of JAX for TPUs; elsewhere it is interpreted, for tests."""
  num_tokens = query.shape[1]
  query = query * jnp.asarray(query.shape[-1] ** -0.5, query.dtype)
  padding = ((0, 0), (0, 0), (0, -num_tokens % _LANES), (0, 0))
  heads = [
    jnp.pad(x.transpose(0, 2, 1, 3), padding) for x in (query, key, value)
  ]
  attend = lambda *heads: jax.lax.platform_dependent(
    *heads,
    tpu=functools.partial(_splash_kernel, length=length, interpret=False),
    default=functools.partial(_splash_kernel, length=length, interpret=True),
  )
  if not jax.sharding.get_abstract_mesh().empty:
    # Nothing else tells the compiler how to split a kernel over devices.
    axes = spmd.logical_to_mesh_axes(("batch", "heads", None, None))
    attend = jax.shard_map(
      attend, in_specs=axes, out_specs=axes, check_vma=False
    )
  return attend(*heads).transpose(0, 2, 1, 3)[:, :num_tokens]


def _splash_kernel(
  query: Float[Array, "B H N d"],
  key: Float[Array, "B H N d"],
  value: Float[Array, "B H N d"],
  length: int,
  interpret: bool,
) -> Float[Array, "B H N d"]:
  # A quarter of a second, where nothing needs it.
  from jax.experimental.pallas.ops.tpu import splash_attention

  _, num_heads, num_tokens, _ = query.shape
  block = next(
    size
    for size in (num_tokens, 512, 384, 256, _LANES)
    if size <= 1024 and num_tokens % size == 0
  )
  every_key = splash_attention.FullMask((num_tokens, num_tokens))
  # Of the forward pass, and of the gradients of keys and values and of queries.
  sizes = splash_attention.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  kernel: Any = splash_attention.make_splash_mha_single_device(
    splash_attention.MultiHeadMask([every_key] * num_heads),
    block_sizes=sizes,
    interpret=interpret,
  )
  # Tokens attend to those of their segment, and padding to padding.
  segment = (jnp.arange(num_tokens) >= length).astype(jnp.int32)
  segments = splash_attention.SegmentIds(segment, segment)
  attend = functools.partial(kernel, segment_ids=segments)
  return jax.vmap(attend)(query, key, value)
