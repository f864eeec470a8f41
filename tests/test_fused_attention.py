"""Attention by one kernel, and which one is chosen."""

import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.models import fused_attention, layers
from blip_jax.runtime import sharding

CPU = jax.devices("cpu")[0]


def device(platform):
  return types.SimpleNamespace(platform=platform, device_kind=f"a {platform}")


def random_heads(num_tokens, dtype="float32"):
  rng = np.random.default_rng(0)
  shape = 8, num_tokens, 2, 64
  return [jnp.array(rng.normal(size=shape), dtype) for _ in range(3)]


def out_and_gradients(attend, heads):
  total = lambda *heads: (attend(*heads) ** 2).sum()
  return attend(*heads), jax.grad(total, (0, 1, 2))(*heads)


@pytest.mark.parametrize("num_tokens", [13, 128])
def test_the_kernel_for_tpus_computes_attention(num_tokens):
  heads = random_heads(num_tokens)
  splash = lambda *heads: fused_attention.attend("splash", *heads, num_tokens)
  expected = out_and_gradients(layers.dot_product_attention, heads)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4),
    out_and_gradients(splash, heads),
    expected,
  )


def test_keys_beyond_the_length_do_not_count():
  query, key, value = random_heads(16)
  out = fused_attention.attend("splash", query, key, value, 9)
  expected = layers.dot_product_attention(query, key[:, :9], value[:, :9])
  np.testing.assert_allclose(out[:, :9], expected[:, :9], rtol=1e-4, atol=1e-5)


def test_the_kernel_for_tpus_is_split_over_devices():
  """Every device computes its examples and its heads, and none is gathered."""
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices())
  heads = random_heads(13)
  splash = lambda *heads: fused_attention.attend("splash", *heads, 13)
  with sharding.activate(mesh):
    split = jax.NamedSharding(
      mesh, jax.P(("data", "fsdp"), None, "tensor", None)
    )
    compiled = jax.jit(splash).lower(*jax.device_put(heads, split)).compile()
    out = compiled(*jax.device_put(heads, split))
  assert "all-gather" not in compiled.as_text()
  np.testing.assert_allclose(out, splash(*heads), rtol=1e-4, atol=1e-5)


def test_what_is_fastest_depends_on_device_dtype_and_tokens(monkeypatch):
  monkeypatch.setattr(fused_attention, "_working", lambda kind, *_: kind)
  choose = lambda platform, *args: fused_attention.choose(
    "", device(platform), *args
  )
  assert choose("gpu", "bfloat16", 197) == "cudnn"
  assert choose("tpu", "bfloat16", 577) == "splash"
  assert choose("tpu", "bfloat16", 197) == "xla"
  assert choose("cpu", "bfloat16", 577) == "xla"
  assert choose("gpu", "float32", 577) == choose("tpu", "float32", 577) == "xla"
  gpu = device("gpu"), "bfloat16", 197
  assert fused_attention.choose("xla", *gpu) == "xla"
  assert fused_attention.choose("cudnn", *gpu) == "cudnn"


@pytest.mark.parametrize("kind", ["cudnn", "splash"])
def test_a_kernel_that_the_device_lacks_is_replaced_and_said_once(kind, caplog):
  fused_attention._working.cache_clear()
  for _ in range(2):
    assert fused_attention.choose(kind, CPU, "bfloat16", 577) == "xla"
  (record,) = caplog.records
  assert record.levelno == logging.WARNING
  for part in (repr(kind), "cpu", "bfloat16", "it is for the platform"):
    assert part in record.getMessage()


def test_a_kernel_that_does_not_compile_is_replaced(caplog, monkeypatch):
  fused_attention._working.cache_clear()
  monkeypatch.setitem(fused_attention._PLATFORMS, "cudnn", "cpu")
  assert fused_attention.choose("", CPU, "bfloat16", 197) == "xla"
  (record,) = caplog.records
  assert "cuDNN is not detected" in record.getMessage()
