"""Golden arrays of the original, and our parameters made from its weights."""

import pathlib

import flax
import jax
import jax.numpy as jnp
import numpy as np

from blip_jax.convert import reader, weights
from blip_jax.models import config

GOLDEN = pathlib.Path(__file__).parent / "golden"

# The tiny models of the goldens (tests/golden/manifest.json, `config`).
TOKENS = config.SpecialTokens(pad=0, cls=2, sep=3, dec=422, enc=423)
VIT = config.ViTConfig(
  image_size=(32, 32),
  patch_size=8,
  width=48,
  depth=2,
  num_heads=4,
  mlp_dim=192,
)
MED = config.MedConfig(
  vocab_size=424,
  width=64,
  depth=2,
  num_heads=4,
  mlp_dim=256,
  max_positions=64,
  dropout=0.0,
  tokens=TOKENS,
)
BLIP = config.BlipConfig(VIT, MED, embed_dim=32)


def arrays(case: str) -> dict[str, jax.Array | np.ndarray]:
  """float64 references stay numpy, for JAX would round them."""
  with np.load(GOLDEN / "data" / f"{case}.npz") as data:
    return {
      name: x if x.dtype == np.float64 else jnp.asarray(x)
      for name, x in data.items()
    }


def state_dict(name: str, prefix: str = "") -> dict[str, np.ndarray]:
  tensors = reader.read(GOLDEN / "ckpt" / f"{name}.pth")
  return {prefix + key: array for key, array in tensors.items()}


def unflatten(flat: dict[str, np.ndarray]) -> dict:
  flat = {path: jnp.asarray(x) for path, x in flat.items()}
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def flatten(params: dict) -> dict[str, np.ndarray]:
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  return {path: np.asarray(x) for path, x in flat.items()}


def leaves(state: dict[str, np.ndarray], layout: str = "original") -> dict:
  return weights.from_theirs(state, layout, weights.Report())


def params(name: str, prefix: str = "") -> dict:
  """Our parameter tree of a golden checkpoint; tied weights appear twice."""
  return item(leaves(state_dict(name, prefix)), "params")


def momentum_params(name: str) -> dict:
  """The momentum twin's tree of a golden checkpoint."""
  return item(leaves(state_dict(name)), "momentum/params_m")


def item(leaves: dict, prefix: str) -> dict:
  prefix += "/"
  return unflatten(
    {
      path.removeprefix(prefix): leaf.read()
      for path, leaf in leaves.items()
      if path.startswith(prefix)
    }
  )


def to_original(params: dict, prefix: str = "params") -> dict[str, np.ndarray]:
  """The original's names and arrays of a tree of ours."""
  ours = {
    f"{prefix}/{path}": weights.Leaf.of(x)
    for path, x in flatten(params).items()
  }
  theirs = weights.to_theirs(ours, "original")
  return {name: leaf.read() for name, leaf in theirs.items()}


def image(array: jax.Array) -> jax.Array:
  """NCHW to NHWC."""
  return array.transpose(0, 2, 3, 1)


def probe(x: np.ndarray) -> float:
  """The goldens' fingerprint of an array, which a transpose would change."""
  x = np.asarray(x, np.float64).ravel()
  return float(x @ np.cos(0.37 * np.arange(x.size) + 0.1))


def assert_gradients_match(golden, grads, grad_names, skip=()):
  """Every gradient against the goldens' norms and fingerprints.

  Tolerances are relative to the global norm: a key bias has no true gradient,
  so a relative error of its own would compare rounding with rounding.
  """
  ours = to_original(grads)
  total = np.sqrt(np.sum(np.asarray(golden["grad_norm"], np.float64) ** 2))
  for i, name in enumerate(grad_names):
    if name in skip:
      continue
    g = np.asarray(ours[name], np.float64)
    tolerance = 1e-5 * total
    error = abs(np.linalg.norm(g) - golden["grad_norm"][i])
    assert error < tolerance, f"{name}: norm is off by {error:.2e}"
    # The fingerprint sums n terms of size g, so it may move by sqrt(n) more.
    error = abs(probe(g) - golden["grad_probe"][i])
    assert error < tolerance * np.sqrt(g.size), f"{name}: probe {error:.2e}"
    if f"grad.{name}" in golden:
      np.testing.assert_allclose(
        g, golden[f"grad.{name}"], atol=tolerance, rtol=1e-4, err_msg=name
      )
