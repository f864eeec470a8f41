"""Products of 8-bit floats: what is rounded, how, and what that changes."""

import logging
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import blip_jax
from blip_jax.export import programs
from blip_jax.models import config, families, float8
from blip_jax.plan import chips, labelling, topology
from blip_jax.runtime import config as runtime_config
from blip_jax.runtime import sharding
from tests import helpers
from tests.test_build import make_config
from tests.test_float32_products import flops_by_dtype


def normal(*shape, scale=1.0, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(scale=scale, size=shape).astype(np.float32)


def rounded_layer(kernel):
  """The kernel and the scale of a layer with these weights."""
  layer = {"blocks": {"fc": {"kernel": jnp.asarray(kernel)[None]}}}
  rounded = float8.round_weights(layer)["blocks"]["fc"]
  return rounded["kernel"][0], rounded["kernel_scale"][0]


def test_a_product_is_that_of_rounded_numbers():
  x = normal(3, 5, 64).astype(ml_dtypes.bfloat16)
  x[0, 0, :2] = 1e4, -1e4  # saturate
  kernel = normal(64, 32, scale=0.05)
  out = float8.product(jnp.asarray(x), *rounded_layer(kernel))
  assert out.dtype == jnp.bfloat16
  e4m3 = lambda x: x.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
  # The largest of these weights is 0.18: 2^-11 is the least power of two by
  # which it is at most 448.
  assert 448 * 2**-12 < abs(kernel).max() < 448 * 2**-11
  expected = e4m3(np.clip(x, -448, 448)) @ e4m3(kernel * 2**11) * 2**-11
  np.testing.assert_allclose(
    np.float64(out), expected, rtol=2**-8, atol=1e-3 * abs(expected[1:]).max()
  )


def test_what_else_is_in_a_batch_changes_nothing():
  layer = rounded_layer(normal(16, 8))
  x = jnp.asarray(normal(4, 16), jnp.bfloat16)
  alone = float8.product(x, *layer)
  batch = jnp.concatenate([x, 300 * x])
  np.testing.assert_array_equal(float8.product(batch, *layer)[:4], alone)


def test_weights_lose_a_sixteenth_at_most_in_a_scale_of_their_matrix():
  kernel = np.stack(
    [normal(40, 30), 1e-20 * normal(40, 30), np.zeros((40, 30))]
  )
  layer = {"layers": {"fc": {"kernel": jnp.asarray(kernel, jnp.float32)}}}
  rounded = float8.round_weights(layer)["layers"]["fc"]
  scale = np.float64(rounded["kernel_scale"])
  assert set(np.frexp(scale)[0]) == {0.5}  # powers of two
  found = np.float64(rounded["kernel"].astype(jnp.float32))
  found *= scale[:, None, None]
  error = abs(found - kernel) / np.maximum(abs(kernel), 1e-3 * scale.max())
  assert 0.05 < error.max() < 1 / 16
  assert abs(found[1]).max() > 1e-20 and not found[2].any()


@pytest.mark.parametrize(
  "weight, expected",
  [
    (np.inf, "expected finite weights for float8, found inf"),
    (np.nan, "expected finite weights for float8, found nan"),
    (1e9, r"weights would be zero in float8, because the largest is 1e\+09"),
  ],
)
def test_absurd_weights_are_refused_by_name(weight, expected):
  kernel = normal(2, 8, 8)
  kernel[1, 2, 3] = weight
  params = {"visual_encoder": {"blocks": {"fc_in": {"kernel": kernel}}}}
  name = "visual_encoder/blocks/fc_in/kernel: "
  with pytest.raises(ValueError, match=f"^{name}.*{expected}"):
    float8.round_weights(params)


def is_rounded(params):
  return {
    sharding.path_str(path).removesuffix("/kernel_scale")
    for path, _ in jax.tree.leaves_with_path(params)
    if path[-1].key == "kernel_scale"
  }


def test_the_layers_of_encoders_are_rounded_and_the_decoders_image_kv():
  model = helpers.make_model("caption")
  attention = {"query", "key", "value", "out"}
  layers = {f"attention/{name}" for name in attention} | {"fc_in", "fc_out"}
  expected = {f"visual_encoder/blocks/{name}" for name in layers}
  of_decoder = "text_decoder/layers/crossattention"
  expected |= {f"{of_decoder}/key", f"{of_decoder}/value"}
  assert is_rounded(float8.round_weights(model.params)) == expected

  rounded = is_rounded(float8.round_weights(helpers.make_model("itm").params))
  layers |= {f"crossattention/{name}" for name in attention}
  assert {name for name in rounded if name.startswith("text_encoder")} == {
    f"text_encoder/layers/{name}" for name in layers
  }


def test_what_is_not_rounded_stays():
  params = helpers.make_model("caption").params
  rounded = float8.round_weights(params)
  same = lambda a, b: a is b
  decoder, other = params["text_decoder"], rounded["text_decoder"]
  assert jax.tree.all(jax.tree.map(same, decoder["lm_head"], other["lm_head"]))
  assert same(decoder["word_embeddings"], other["word_embeddings"])
  tower, other = params["visual_encoder"], rounded["visual_encoder"]
  for name in ("patch_embed", "cls_token", "ln_post"):
    assert jax.tree.all(jax.tree.map(same, tower[name], other[name])), name
  assert not float8.is_used(params) and float8.is_used(rounded)


def test_gradients_are_those_without_rounding_activations():
  x, kernel = jnp.asarray(normal(4, 16)), normal(16, 8)
  rounded, scale = rounded_layer(kernel)
  exact = rounded.astype(jnp.float32) * scale
  total = lambda f: jax.grad(lambda x: (f(x) ** 2).sum())(x)
  np.testing.assert_allclose(
    total(lambda x: float8.product(x, rounded, scale)),
    2 * float8.product(x, rounded, scale) @ exact.T,
    rtol=1e-5,
  )


def base_encoder(batch_size):
  """The function of ViT-B/16 at 384 pixels, and shapes of its arguments."""
  sizes = config.variant(
    "base",
    image_size=384,
    vocab_size=30524,
    tokens=config.SpecialTokens(),
    dtype="bfloat16",
  )
  model = families.build("caption", sizes)
  pixels = jax.ShapeDtypeStruct((batch_size, 384, 384, 3), np.float32)
  params = families.abstract("caption", sizes)["visual_encoder"]
  with pytest.MonkeyPatch.context() as patch:  # there are no weights to read
    rounded = lambda name, layer: float8._rounded(layer["kernel"])[:2]
    patch.setattr(float8, "_checked", rounded)
    params = jax.eval_shape(float8.round_weights, {"visual_encoder": params})

  def encode(params, pixels):
    return model.apply({"params": params}, pixels, method="encode_image")

  return encode, (params, pixels)


def test_nearly_all_products_of_the_encoder_are_of_8_bit_floats():
  """577 tokens; 12 layers of matrices that are as large as 12 of 768 x 768.
  The rest are products of attention, and of 576 patches."""
  encode, args = base_encoder(1)
  flops = flops_by_dtype(jax.make_jaxpr(encode)(*args).jaxpr)
  assert flops.pop("float8_e4m3fn") == 12 * 12 * 2 * 577 * 768**2
  attention = 12 * 2 * 2 * 577**2 * 768
  assert flops == {"bfloat16": attention + 2 * 576 * 16 * 16 * 3 * 768}


def test_a_gpu_calls_the_product_of_8_bit_floats():
  """Compiled for an H100 that is not there: one kernel for each of the six
  matrices of a layer, which adds the bias too."""
  pytest.importorskip("jax_cuda12_plugin", reason="needs the extra [gpu-aot]")
  found = topology.parse("h100:1x1")
  encode, args = base_encoder(64)
  place = jax.sharding.SingleDeviceSharding(found.devices[0])
  args = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), args
  )
  lowered = jax.jit(encode).lower(*args)
  text = lowered.compile(found.compiler_options).as_text()
  calls = [x for x in text.splitlines() if '"__cublas$lt$matmul$f8"' in x]
  assert len(calls) == 6
  assert all('"epilogue":"BIAS"' in call for call in calls)


@pytest.fixture(scope="module")
def models():
  source = helpers.golden_checkpoint("blip_pretrain")
  load = lambda dtype: blip_jax.load(
    source, dtype=dtype, mesh=1, **helpers.OPEN_GOLDEN
  )
  return {dtype: load(dtype) for dtype in ("bfloat16", "float8")}


def test_a_loaded_model_says_what_it_is(models):
  assert {name: model.dtype for name, model in models.items()} == {
    "bfloat16": "bfloat16",
    "float8": "float8",
  }
  lines = repr(models["float8"]).splitlines()
  assert "activations float8" in lines[3]
  plain = repr(models["bfloat16"]).replace("bfloat16", "float8").splitlines()
  assert lines == plain  # the same number of parameters


def test_outputs_are_near_those_of_bfloat16(models):
  images = [
    np.random.default_rng(n).integers(0, 256, (32, 32, 3), np.uint8)
    for n in range(3)
  ]
  features = {
    name: np.asarray(model.features(images).states, np.float32)
    for name, model in models.items()
  }
  error = features["float8"] - features["bfloat16"]
  size = np.linalg.norm(features["bfloat16"])
  assert 0.005 < np.linalg.norm(error) / size < 0.1
  cosines = {
    name: model.match(images, ["a dog", "a cat"]).itc_cosine
    for name, model in models.items()
  }
  np.testing.assert_allclose(cosines["float8"], cosines["bfloat16"], atol=0.05)


def test_rounded_weights_stay_where_they_are_on_the_mesh():
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
  source = helpers.golden_checkpoint("blip_decoder")
  load = lambda dtype: blip_jax.load(
    source, dtype=dtype, mesh=mesh, **helpers.OPEN_GOLDEN
  )
  model, plain = load("float8"), load("bfloat16")
  kernel = lambda model: model.params["visual_encoder"]["blocks"]["fc_in"][
    "kernel"
  ]
  assert kernel(model).dtype == float8.KIND
  shape = kernel(plain).shape
  assert kernel(plain).sharding.shard_shape(shape) != shape
  assert kernel(model).sharding.shard_shape(shape) == kernel(
    plain
  ).sharding.shard_shape(shape)
  assert len(model.caption(np.zeros((3, 8, 8, 3), np.uint8))) == 3


def device(platform, kind, **capability):
  return types.SimpleNamespace(
    platform=platform, device_kind=kind, **capability
  )


@pytest.mark.parametrize("capability", ["8.9", "9.0", "10.0"])
def test_newer_gpus_have_such_products(capability):
  float8.check_device(device("gpu", "a GPU", compute_capability=capability))


@pytest.mark.parametrize(
  "found",
  [
    device("gpu", "NVIDIA A100", compute_capability="8.0"),
    device("gpu", "NVIDIA A10", compute_capability="8.6"),
    device("gpu", "AMD Instinct MI300X", compute_capability="gfx942"),
    device("tpu", "TPU v5 lite"),
  ],
)
def test_other_accelerators_are_refused(found):
  expected = rf"^dtype 'float8': .* 8\.9 or more.*{found.device_kind}.*bfloat16"
  with pytest.raises(ValueError, match=expected):
    float8.check_device(found)


def test_a_cpu_says_once_that_it_emulates(caplog):
  float8._say_emulated.cache_clear()
  for _ in range(2):
    float8.check_device(jax.devices("cpu")[0])
  (record,) = caplog.records
  assert record.levelno == logging.WARNING
  assert "a CPU emulates it" in record.getMessage()


@pytest.mark.parametrize("job", ["train", "evaluate"])
def test_it_is_not_for_training(job):
  run = make_config("pretrain")
  run.job, run.model.dtype = job, "float8"
  expected = (
    "model.dtype: 'float8' is neither for training nor for the evaluation"
  )
  with pytest.raises(ValueError, match=rf"^config\.{expected}.*config\.dtype"):
    runtime_config.validate(run)


def test_it_is_not_exported_nor_planned(models):
  with pytest.raises(ValueError, match=r"export: .*'float32', found 'float8'"):
    programs.programs_of(models["float8"])
  job = blip_jax.defaults.capfilt()
  job.dtype = "float8"
  gpu = topology.Topology("h100:1x1", chips.CHIPS["h100"], jax.devices()[:1], 1)
  with pytest.raises(ValueError, match=r"config\.dtype: .*no plans.*'float8'"):
    labelling.plan(job, gpu)
