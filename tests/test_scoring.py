"""Scores of image-text pairs, compared with scoring each pair alone."""

import functools

import jax
import numpy as np
import pytest

from blip_jax.inference import scoring
from blip_jax.models import blip, config, families
from blip_jax.runtime import sharding
from blip_jax.tasks import align
from tests import helpers

MODEL = blip.Blip(helpers.BLIP)
IMAGES, TEXTS, LENGTH = 8, 40, 35


@pytest.fixture(scope="module")
def params():
  params = helpers.init("itm", MODEL.config, jax.random.key(0))
  return helpers.sharper(params, 3)


@pytest.fixture(scope="module")
def texts():
  """Texts of 3 to 35 tokens."""
  rng = np.random.default_rng(1)
  lengths = rng.integers(3, LENGTH + 1, TEXTS)
  mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
  ids = rng.integers(5, 400, (TEXTS, LENGTH)).astype(np.int32)
  return scoring.Texts(ids * mask, mask)


@pytest.fixture(scope="module")
def image_embeds(params):
  image = jax.random.normal(jax.random.key(2), (IMAGES, 32, 32, 3))
  encode = functools.partial(MODEL.apply, method="encode_image")
  return jax.jit(encode)({"params": params}, image)


@functools.partial(jax.jit, static_argnames="legacy_cls")
def plain(params, image_embeds, ids, mask, legacy_cls=False):
  """Each text with its own copy of the image, projected for it alone."""
  call = functools.partial(MODEL.apply, {"params": params})
  kv = call(image_embeds, method="image_kv")
  return call(ids, mask, kv, legacy_cls=legacy_cls, method="match")


@pytest.mark.parametrize("legacy_cls", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 2), (2, 2, 2)])
def test_scores_equal_those_of_each_pair_alone(
  params, texts, image_embeds, shape, legacy_cls
):
  mesh = sharding.make_mesh(
    dict(zip(("data", "fsdp", "tensor"), shape, strict=True)),
    jax.devices()[: np.prod(shape)],
  )
  rng = np.random.default_rng(3)
  candidates = [
    rng.choice(TEXTS, n, replace=False) for n in (40, 0, 1, 17, 16, 3, 33, 2)
  ]
  scorer = scoring.Scorer(align.predict_fns(MODEL), mesh)
  placed = jax.device_put(
    jax.device_get(params), sharding.state_shardings(params, mesh)
  )
  batch = sharding.put_batch({"embeds": np.asarray(image_embeds)}, mesh)
  logits = scorer.itm_logits(
    placed, batch["embeds"], texts, candidates, legacy_cls
  )
  assert [len(rows) for rows in logits] == [len(rows) for rows in candidates]
  image = np.repeat(np.arange(IMAGES), [len(rows) for rows in candidates])
  rows = np.concatenate(candidates)
  expected = plain(
    params,
    np.asarray(image_embeds)[image],
    texts.input_ids[rows],
    texts.attention_mask[rows],
    legacy_cls,
  )
  np.testing.assert_allclose(np.concatenate(logits), expected, atol=2e-5)


def test_few_programs_serve_all_blocks(params, texts, image_embeds):
  """One for each length of texts, in eights, whatever the candidates are."""
  scorer = scoring.Scorer(align.predict_fns(MODEL), sharding.one_device())
  rng = np.random.default_rng(4)
  for _ in range(4):
    candidates = [
      rng.choice(TEXTS, rng.integers(9, TEXTS), replace=False)
      for _ in range(IMAGES)
    ]
    scorer.itm_logits(params, image_embeds, texts, candidates)
  assert scorer.match._cache_size() <= 5
  assert scorer.image_kv._cache_size() == 1


def test_texts_are_trimmed_to_the_longest(texts):
  short = scoring.Texts(texts.input_ids[:, :], texts.attention_mask * 0)
  short.attention_mask[:, :9] = 1
  assert scoring.trimmed(short).input_ids.shape == (TEXTS, 16)
  assert scoring.trimmed(texts).input_ids.shape == (TEXTS, LENGTH)


def full_width(variant, size, dtype):
  """A model of the paper's widths, one layer deep."""
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
def test_a_block_needs_no_more_memory_than_planned(dtype):
  """Compared with what the compiler says its programs need."""
  sizes = full_width("base", 384, dtype)
  fns = align.predict_fns(blip.Blip(sizes))
  params = families.abstract("itm", sizes)
  shape = lambda *dims, kind=np.int32: jax.ShapeDtypeStruct(dims, kind)
  images = 2
  text = shape(images * scoring.TEXTS_AT_ONCE, LENGTH)
  pixels = shape(images, 384, 384, 3, kind=np.uint8)
  embeds, _ = jax.eval_shape(fns["image_features"], params, pixels)
  image_kv = jax.eval_shape(fns["image_kv"], params, embeds)
  stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(image_kv))
  planned = images * scoring.image_bytes(sizes, LENGTH)
  for function, args in (
    (fns["image_features"], (params, pixels)),
    (fns["image_kv"], (params, embeds)),
    (fns["match"], (params, text, text, image_kv)),
  ):
    analysis = jax.jit(function).lower(*args).compile().memory_analysis()
    needs = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    if function is not fns["image_kv"]:
      needs += stored
    assert needs <= planned


def test_an_evaluation_on_coco_fits_in_4_gb():
  """Weights, momentum encoder, queues and a block of images: 5,000 images and
  25,000 texts need no more."""
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


@pytest.mark.parametrize(
  "dtype, num_frames, expected",
  [
    # 577 tokens of 4 bytes: embeddings of width 768, and keys and values of 12
    # layers, 44,313,600 bytes. Encoding holds, per token, 3072 + 4 * 768
    # numbers and the weights of 12 heads over 577 tokens: 30,160,944 bytes,
    # more than the 29,272,320 of 16 texts of 35 tokens.
    ("float32", 1, 44_313_600 + 2 * 30_160_944),
    ("float32", 8, 354_508_800 + 2 * 241_287_552),
    # Weights stay float32: 577 * (12,288 + 27,696).
    ("bfloat16", 1, 22_156_800 + 2 * 23_070_768),
  ],
)
def test_the_memory_of_an_image_by_hand(dtype, num_frames, expected):
  sizes = config.variant(
    "base",
    image_size=384,
    vocab_size=30524,
    tokens=config.SpecialTokens(),
    dtype=dtype,
  )
  assert scoring.image_bytes(sizes, 35, num_frames) == expected
  mesh = sharding.make_mesh({"data": 4, "fsdp": 2, "tensor": 1})
  found = scoring.block_size(sizes, mesh, 35, num_frames)
  assert found == 8 * (2**30 // expected)


def test_long_texts_need_more_memory_than_the_image():
  """64 tokens: 16 * 64 * (4 * (256 + 4 * 64) + 4 * 4 * 17) bytes."""
  stored = 17 * 4 * (48 + 2 * 2 * 64)
  matching = 16 * 64 * (2048 + 272)
  found = scoring.image_bytes(helpers.BLIP, 64)
  assert found == stored + 2 * matching


def test_a_block_has_an_image_at_least(monkeypatch):
  monkeypatch.setattr(scoring, "BLOCK_BYTES", 1)
  assert scoring.block_size(helpers.BLIP, sharding.one_device(), 35) == 1


@pytest.mark.parametrize(
  "candidates, lengths, index, order",
  [
    # Padded with the shortest text, short texts first.
    (
      [[2, 0, 1], [1]],
      [5, 3, 9],
      [[[1, 0, 2, 1]], [[1, 1, 1, 1]]],
      [[2, 1, 0], [0]],
    ),
    ([[0], [1]], [5, 3], [[[0]], [[1]]], [[0], [0]]),
    ([[0, 1]], [5, 3], [[[1, 0]]], [[1, 0]]),
    ([[], []], [5], np.empty((2, 0, 1)).tolist(), [[], []]),
  ],
)
def test_candidates_are_scored_in_rounds(candidates, lengths, index, order):
  rows = [np.array(c, int) for c in candidates]
  found, places = scoring._in_rounds(
    rows, np.array(lengths), sharding.one_device()
  )
  assert found.tolist() == index
  assert [p.tolist() for p in places] == order


@pytest.mark.parametrize(
  "number, width, rounds", [(8, 8, 1), (9, 16, 1), (16, 16, 1), (17, 16, 2)]
)
def test_a_round_has_a_power_of_two_up_to_sixteen(number, width, rounds):
  found, _ = scoring._in_rounds(
    [np.arange(number)], np.arange(1, 41), sharding.one_device()
  )
  assert found.shape == (1, rounds, width)


def test_texts_are_trimmed_to_multiples_of_eight():
  for longest, kept in ((1, 8), (8, 8), (9, 16), (30, 32), (33, 35)):
    mask = np.zeros((2, 35), np.int32)
    mask[0, :longest] = mask[1, :1] = 1
    trimmed = scoring.trimmed(scoring.Texts(mask + 4, mask))
    assert trimmed.input_ids.shape == trimmed.attention_mask.shape == (2, kept)
    assert trimmed.lengths.tolist() == [longest, 1]
