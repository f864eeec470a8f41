"""Pairs of pictures and texts, beside the plain way of scoring each alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.evaluators import ranking
from blip_jax.inference import scoring
from blip_jax.models import blip, config, families
from blip_jax.runtime import sharding
from blip_jax.tasks import align
from tests import helpers

MODEL = blip.Blip(helpers.BLIP)
IMAGES, TEXTS, LENGTH = 8, 40, 35


@pytest.fixture(scope="module")
def params():
  params = families.init("itm", MODEL.config, jax.random.key(0))
  return jax.tree.map(lambda x: 3 * x if x.ndim == 2 else x, params)


@pytest.fixture(scope="module")
def texts():
  """Of 3 to 35 tokens."""
  rng = np.random.default_rng(1)
  lengths = rng.integers(3, LENGTH + 1, TEXTS)
  mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
  ids = rng.integers(5, 400, (TEXTS, LENGTH)).astype(np.int32)
  return scoring.Texts(ids * mask, mask)


@pytest.fixture(scope="module")
def image_embeds(params):
  image = jax.random.normal(jax.random.key(2), (IMAGES, 32, 32, 3))
  return MODEL.apply({"params": params}, image, method="encode_image")


@functools.partial(jax.jit, static_argnames="legacy_cls")
def plain(params, image_embeds, ids, mask, legacy_cls=False):
  """Each text with its own copy of the picture, projected for it alone."""
  call = functools.partial(MODEL.apply, {"params": params})
  kv = call(image_embeds, method="image_kv")
  return call(ids, mask, kv, legacy_cls=legacy_cls, method="match")


@pytest.mark.parametrize("legacy_cls", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 2), (2, 2, 2)])
def test_each_pair_has_the_score_that_it_has_alone(
  params, texts, image_embeds, shape, legacy_cls
):
  mesh = sharding.make_mesh(
    dict(zip(("data", "fsdp", "tensor"), shape, strict=True)),
    jax.devices()[: np.prod(shape)],
  )
  rng = np.random.default_rng(3)
  wanted = [
    rng.choice(TEXTS, n, replace=False) for n in (40, 0, 1, 17, 16, 3, 33, 2)
  ]
  scorer = scoring.Scorer(align.predict_fns(MODEL), mesh)
  placed = jax.device_put(params, sharding.state_shardings(params, mesh))
  batch = sharding.put_batch({"embeds": np.asarray(image_embeds)}, mesh)
  found = scorer.itm_logits(placed, batch["embeds"], texts, wanted, legacy_cls)
  assert [len(rows) for rows in found] == [len(rows) for rows in wanted]
  image = np.repeat(np.arange(IMAGES), [len(rows) for rows in wanted])
  rows = np.concatenate(wanted)
  expected = plain(
    params,
    image_embeds[image],
    jnp.asarray(texts.input_ids[rows]),
    jnp.asarray(texts.attention_mask[rows]),
    legacy_cls,
  )
  np.testing.assert_allclose(np.concatenate(found), expected, atol=2e-5)


def test_few_programs_serve_all_blocks(params, texts, image_embeds):
  """One for each length of texts, in eights, whatever is wanted."""
  scorer = scoring.Scorer(align.predict_fns(MODEL), sharding.one_device())
  rng = np.random.default_rng(4)
  for _ in range(4):
    wanted = [
      rng.choice(TEXTS, rng.integers(9, TEXTS), replace=False)
      for _ in range(IMAGES)
    ]
    scorer.itm_logits(params, image_embeds, texts, wanted)
  assert scorer._look._cache_size() <= 5
  assert scorer._image_kv._cache_size() == 1


def test_padding_that_nobody_needs_is_cut(texts):
  short = scoring.Texts(texts.input_ids[:, :], texts.attention_mask * 0)
  short.attention_mask[:, :9] = 1
  assert scoring.trimmed(short).input_ids.shape == (TEXTS, 16)
  assert scoring.trimmed(texts).input_ids.shape == (TEXTS, LENGTH)


def full_width(variant, size, dtype):
  """The widths of the paper's models, a layer deep where that is what fits."""
  return config.variant(
    variant,
    image_size=size,
    vocab_size=30524,
    tokens=helpers.BLIP.med.tokens,
    dtype=dtype,
    vit=dict(depth=1),
    med=dict(depth=1),
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_block_takes_no_more_than_was_planned(dtype):
  """Beside what the compiler itself says that its programs need."""
  sizes = full_width("base", 384, dtype)
  fns = align.predict_fns(blip.Blip(sizes))
  params = families.abstract("itm", sizes)
  shape = lambda *dims, kind=np.int32: jax.ShapeDtypeStruct(dims, kind)
  images = 2
  text = shape(images * scoring.TEXTS_AT_ONCE, LENGTH)
  pixels = shape(images, 384, 384, 3, kind=np.uint8)
  embeds, _ = jax.eval_shape(fns["image_features"], params, pixels)
  image_kv = jax.eval_shape(fns["image_kv"], params, embeds)
  kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(image_kv))
  planned = images * scoring.image_bytes(sizes, LENGTH)
  for function, args in (
    (fns["image_features"], (params, pixels)),
    (fns["image_kv"], (params, embeds)),
    (fns["match"], (params, text, text, image_kv)),
  ):
    analysis = jax.jit(function).lower(*args).compile().memory_analysis()
    needs = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    if function is not fns["image_kv"]:
      needs += kept
    assert needs <= planned
    # CPUs hold bfloat16 weights' copies in float32.


def test_the_whole_of_coco_fits_in_4_gb():
  """5,000 pictures and 25,000 texts: weights, twin, queues and a block."""
  sizes = config.variant(
    "base",
    image_size=384,
    vocab_size=30524,
    tokens=helpers.BLIP.med.tokens,
  )
  weights = families.abstract("retrieval", sizes)
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights))
  queues = 2 * 57600 * 256 * 4
  assert scoring.block_size(sizes, sharding.one_device(), LENGTH) >= 4
  assert 2 * size + queues + scoring.BLOCK_BYTES < 4 << 30


def test_short_lists_by_hand():
  sim = np.array([[0.9, 0.1, 0.5], [0.8, 0.7, 0.6]], np.float32)
  lists = ranking.ShortLists.of(sim, 1)
  np.testing.assert_array_equal(lists.i2t, [[1, 0, 0], [1, 0, 0]])
  np.testing.assert_array_equal(lists.t2i, [[1, 0], [0, 1], [0, 1]])
  np.testing.assert_array_equal(lists.wanted, [[1, 0, 0], [1, 1, 1]])
  i2t, t2i = lists.ranked(sim)
  np.testing.assert_array_equal(i2t[0], sim[0] * [1, 0, 0] - [0, 100, 100])
  np.testing.assert_array_equal(t2i[1], [-100, np.float32(0.7)])
  everything = ranking.ShortLists.of(sim, 256)
  assert everything.i2t.all() and everything.t2i.all()
