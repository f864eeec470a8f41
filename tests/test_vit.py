"""The image tower against the original (golden case `vit`)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.models import config, vit
from tests import helpers


@pytest.fixture(scope="module")
def golden():
  return helpers.arrays("vit")


@pytest.fixture(scope="module")
def params():
  return helpers.params("vit", "visual_encoder.")["visual_encoder"]


@functools.partial(jax.jit, static_argnames=("config", "deterministic"))
def forward(params, image, config=helpers.VIT, **kwargs):
  return vit.ViT(config).apply({"params": params}, image, **kwargs)


def test_features(golden, params):
  features = forward(params, helpers.image(golden["image"]))
  np.testing.assert_allclose(features, golden["features"], atol=1e-5)


resize_pos_embed = jax.jit(vit.resize_pos_embed, static_argnums=(1, 2))


@pytest.mark.parametrize("side", [3, 4, 5, 8])
def test_resize_pos_embed(golden, params, side):
  resized = resize_pos_embed(params["pos_embed"], (4, 4), (side, side))
  expected = golden[f"pos_embed_to_grid{side}"]
  np.testing.assert_allclose(resized, expected, atol=1e-6)


def test_resize_pos_embed_keeps_rows_and_columns_apart():
  rows = np.repeat(np.arange(4.0), 4)
  pos_embed = np.concatenate([[0.0], rows])[None, :, None]
  resized = resize_pos_embed(pos_embed, (4, 4), (8, 6))
  grid = np.asarray(resized)[0, 1:, 0].reshape(8, 6)
  np.testing.assert_allclose(grid, grid[:, :1] * np.ones((1, 6)), atol=1e-6)
  assert (np.diff(grid[:, 0]) > 0).all()


def test_other_image_size_interpolates(golden, params):
  """The original resizes the stored weights; here it happens in the model."""
  features = forward(params, helpers.image(golden["image_big"]))
  np.testing.assert_allclose(features, golden["features_big"], atol=1e-5)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_images_in_turns(params, number):
  """The outputs do not depend on how many images a block takes at a time."""
  images = jax.random.normal(jax.random.key(0), (5, 32, 32, 3))
  in_turns = dataclasses.replace(helpers.VIT, images_at_once=number)
  for vit_config, loops in (in_turns, 1), (helpers.VIT, 0):
    run = functools.partial(forward, params, config=vit_config)
    assert str(jax.make_jaxpr(run)(images)).count("scan[") == 1 + loops
  np.testing.assert_allclose(
    forward(params, images, in_turns), forward(params, images), atol=1e-5
  )


def test_image_size_that_the_patch_size_does_not_divide(params):
  with pytest.raises(ValueError, match="multiples of the patch size 8"):
    forward(params, jnp.zeros((1, 33, 32, 3)))


def squares(golden, cfg=helpers.VIT):
  """A function of the parameters."""
  image = helpers.image(golden["image"])
  return lambda params: jnp.sum(forward(params, image, cfg) ** 2)


@pytest.fixture(scope="module")
def gradients(golden, params):
  return jax.jit(jax.grad(squares(golden)))(params)


@pytest.mark.parametrize("policy", config.REMAT_POLICIES)
def test_remat_does_not_change_gradients(golden, params, gradients, policy):
  loss = squares(golden, dataclasses.replace(helpers.VIT, remat=policy))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
    jax.jit(jax.grad(loss))(params),
    gradients,
  )
  recomputes = "remat" in str(jax.make_jaxpr(loss)(params))
  assert recomputes == (policy != "none")


def test_drop_path_drops_the_residual_of_entire_examples(params):
  """Only the last block drops, so an example gets its output or its input."""
  cfg = dataclasses.replace(helpers.VIT, drop_path=0.9)
  image = jax.random.normal(jax.random.key(0), (64, 32, 32, 3))
  deterministic = np.asarray(forward(params, image, cfg))
  dropped = np.asarray(
    forward(
      params,
      image,
      cfg,
      deterministic=False,
      rngs={"dropout": jax.random.key(1)},
    )
  )
  first = jax.tree.map(lambda x: np.asarray(x)[:1], params["blocks"])
  expected = np.asarray(forward({**params, "blocks": first}, image))
  unchanged = np.abs(dropped - expected).max(axis=(1, 2)) < 1e-5
  # Both branches drop with probability 0.81.
  assert 0.6 < unchanged.mean() < 0.95
  assert np.abs(deterministic - expected).max() > 1e-2


def test_bfloat16_computes_in_bfloat16_over_float32_parameters(golden, params):
  cfg = dataclasses.replace(helpers.VIT, dtype="bfloat16")
  features = forward(params, helpers.image(golden["image"]), cfg)
  assert features.dtype == jnp.bfloat16
  error = np.abs(
    np.asarray(features, np.float32) - np.asarray(golden["features"])
  )
  assert error.mean() < 0.03
