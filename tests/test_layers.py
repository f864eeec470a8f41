"""How weights start, and what dropping does."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.models import (
  blip,
  config,
  families,
  initial,
  layers,
  med,
  nlvr,
  stack,
  vit,
)
from tests import helpers

KEY = jax.random.key(0)


def assert_uniform(values, bound):
  """Of thousands of values, the largest are near the bounds."""
  values = np.asarray(values).ravel()
  assert 0.99 * bound < values.max() <= bound
  assert -0.99 * bound > values.min() >= -bound
  np.testing.assert_allclose(values.std(), bound / 3**0.5, rtol=0.05)


def started(module, x):
  return initial.sample(module.init(KEY, x)["params"], KEY)


def test_heads_start_as_pytorchs_linear_layers_do():
  dense = layers.torch_dense(4000, 25)
  params = started(dense, jnp.ones((1, 25)))
  assert_uniform(params["kernel"], 0.2)
  assert_uniform(params["bias"], 0.2)


def test_patches_start_as_pytorchs_convolutions_do():
  """The fan-in of a patch of 4 x 4 pixels of 3 colours is 48."""
  embed = vit.PatchEmbed(2000, 4, "float32")
  params = started(embed, jnp.ones((1, 4, 4, 3)))
  assert_uniform(params["kernel"], 48**-0.5)
  assert_uniform(params["bias"], 48**-0.5)


@pytest.fixture(scope="module")
def params():
  sizes = config.variant(
    "tiny",
    image_size=64,
    vocab_size=900,
    tokens=config.SpecialTokens(dec=898, enc=899),
    vit=dict(init_std=0.05, pos_embed_std=0.3, depth=1),
    med=dict(init_std=0.07, num_heads=4, depth=1),
  )
  return jax.jit(lambda key: families.init("pretrain", sizes, key))(KEY)


@pytest.mark.parametrize(
  "path, std",
  [
    ("visual_encoder/cls_token", 0.05),
    ("visual_encoder/pos_embed", 0.3),
    ("visual_encoder/blocks/attention/query/kernel", 0.05),
    ("visual_encoder/blocks/fc_in/kernel", 0.05),
    ("visual_encoder/blocks/fc_out/kernel", 0.05),
    ("text_encoder/word_embeddings", 0.07),
    ("text_encoder/position_embeddings", 0.07),
    ("text_encoder/layers/fc_in/kernel", 0.07),
    ("text_encoder/layers/crossattention/value/kernel", 0.07),
    ("text_decoder/layers/attention/out/kernel", 0.07),
    ("text_decoder/lm_head/transform/kernel", 0.07),
  ],
)
def test_towers_start_from_normal_distributions(params, path, std):
  values = helpers.flatten(params)[path]
  rtol = 0.2 if values.size < 1000 else 0.05
  np.testing.assert_allclose(values.std(), std, rtol=rtol)
  assert abs(values.mean()) < 4 * std / values.size**0.5


def test_biases_start_at_zero_and_norms_at_one(params):
  for path, values in helpers.flatten(params).items():
    is_head = path.split("/")[0] in ("vision_proj", "text_proj", "itm_head")
    if path.endswith("scale"):
      assert (values == 1).all(), path
    elif path.endswith("bias") and not is_head and "patch" not in path:
      assert (values == 0).all(), path


def test_the_temperature_starts_at_seven_hundredths(params):
  np.testing.assert_allclose(params["temp"], 0.07)
  assert set(families.FAMILIES) - set(families.WITH_MOMENTUM) == {
    *("feature", "caption", "vqa", "itm", "nlvr", "dialog")
  }


def test_epsilons_are_those_of_timm_and_bert():
  """x / sqrt(var + eps) of values whose variance is the epsilon itself."""
  for norm, eps in (
    (vit.layer_norm("float32", "ln"), 1e-6),
    (med.layer_norm("float32"), 1e-12),
  ):
    x = jnp.array([[eps**0.5, -(eps**0.5)]])
    y = norm.apply({"params": started(norm, x)}, x)
    np.testing.assert_allclose(y, [[0.5**0.5, -(0.5**0.5)]], rtol=1e-3)


def test_drop_path_drops_examples_and_scales_the_others():
  x = jnp.ones((4000, 2, 3))
  keep = jax.random.bernoulli(KEY, 0.25, (4000, 1, 1))
  y = layers.drop(x, keep, 0.75)
  per_example = y.reshape(4000, -1)
  assert (per_example == per_example[:, :1]).all()
  assert set(np.unique(per_example)) == {0.0, 4.0}
  np.testing.assert_allclose((per_example[:, 0] > 0).mean(), 0.25, atol=0.03)
  assert (layers.drop(x, jnp.ones((4000, 1, 1), bool), 0.0) == x).all()


def test_dropout_drops_elements_and_scales_the_others():
  """Elements, rows and layers are independent."""
  x = jnp.ones((40, 500))
  dropout = layers.Dropout(0.75)
  apply = lambda **kwargs: dropout.apply({}, x, False, **kwargs)
  masks = layers.sample_masks(
    KEY, 0.75, 3, lambda: apply(mutable=[layers.MASKS])
  )
  assert jax.tree.map(jnp.shape, masks) == {"keep": (3, 40, 500)}
  for i in range(3):
    own = {layers.MASKS: {"keep": masks["keep"][i]}}
    y = np.asarray(dropout.apply(own, x, False))
    assert set(np.unique(y)) == {0.0, 4.0}
    np.testing.assert_allclose((y > 0).mean(), 0.25, atol=0.02)
    assert (y > 0).mean(axis=0).std() < 0.1 and len(np.unique(y, axis=0)) == 40
  assert len(np.unique(masks["keep"].reshape(120, 500), axis=0)) == 120
  assert (dropout.apply({}, x, True) == x).all()
  assert (layers.Dropout(0.0).apply({}, x, False) == x).all()


def test_masks_of_a_layer_have_rows_for_texts_and_for_images():
  """Six texts of two images: all masks are parts of one sample."""

  class Two(nn.Module):
    @nn.compact
    def __call__(self, texts, images):
      drop = lambda x, name: layers.Dropout(0.5, name=name)(x, False)
      return drop(texts, "a"), drop(images, "b")

  texts, images = jnp.ones((6, 5)), jnp.ones((2, 4, 15))
  apply = lambda: Two().apply({}, texts, images, mutable=[layers.MASKS])
  masks = layers.sample_masks(KEY, 0.5, 2, apply)
  assert masks["a"]["keep"].shape == (2, 6, 5)
  assert masks["b"]["keep"].shape == (2, 2, 4, 15)
  sampled = layers.keep_mask(KEY, 0.5, (2, 2, 75))
  np.testing.assert_array_equal(
    masks["a"]["keep"].reshape(2, 2, 15), sampled[..., :15]
  )
  np.testing.assert_array_equal(
    masks["b"]["keep"].reshape(2, 2, 60), sampled[..., 15:]
  )


def test_rates_of_dropped_paths_rise_from_zero_to_the_last_block(monkeypatch):
  rates = []
  monkeypatch.setattr(
    layers, "drop", lambda x, keep, rate: rates.append(rate) or x
  )
  sizes = config.ViTConfig((8, 8), 8, 8, 5, 2, 8, drop_path=0.2)
  model, image = vit.ViT(sizes), jnp.ones((1, 8, 8, 3))
  params = stack.unstack(initial.shapes(model.init(KEY, image)["params"]))
  rates.clear()
  model.apply({"params": params}, image, False, rngs={"dropout": KEY})
  twice = np.repeat([0, 0.05, 0.1, 0.15, 0.2], 2)
  np.testing.assert_allclose(rates, twice, atol=1e-7)


def test_attention_by_hand():
  """Two queries share three keys; scores are divided by the root of 4."""
  rng = np.random.default_rng(0)
  query, key = rng.normal(size=(2, 1, 1, 4)), rng.normal(size=(1, 3, 1, 4))
  value = rng.normal(size=(1, 3, 1, 4))
  bias = np.array([0.0, -1e9, 1.0])
  found = layers.dot_product_attention(
    *(jnp.asarray(x, jnp.float32) for x in (query, key, value)),
    jnp.asarray(bias, jnp.float32)[None, None, None],
  )
  for i in range(2):
    scores = np.exp(key[0, :, 0] @ query[i, 0, 0] / 2 + bias)
    expected = scores / scores.sum() @ value[0, :, 0]
    np.testing.assert_allclose(found[i, 0, 0], expected, rtol=1e-5)


def test_unit_vectors_of_nothing_are_nothing():
  x = jnp.array([[3.0, 4.0], [0.0, 0.0], [3e-13, 4e-13]])
  np.testing.assert_allclose(
    blip._unit(x), [[0.6, 0.8], [0, 0], [0.3, 0.4]], rtol=1e-5
  )


@pytest.mark.parametrize(
  "depth, averaging, merging", [(2, 2, 0), (6, 6, 0), (7, 6, 1), (12, 6, 6)]
)
def test_two_images_are_averaged_below_layer_six(depth, averaging, merging):
  sizes = dataclasses.replace(helpers.MED, depth=depth)
  found = {
    part.cross_attention(sizes).learned: part.depth
    for part in nlvr.two_image_stacks(sizes)
  }
  assert found == {False: averaging} | ({True: merging} if merging else {})


def test_masks_of_text_and_images_are_the_originals():
  mask = jnp.array([[1, 0]])
  np.testing.assert_allclose(med._encoder_bias(mask), [[[[0.0, -1e9]]]])
