"""The text tower in its three modes against the original (golden `med`)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.models import config, med
from blip_jax.tasks import losses
from tests import helpers

ENCODER = med.Med(helpers.MED)
DECODER = med.Med(helpers.MED, with_lm_head=True)


@pytest.fixture(scope="module")
def golden():
  return helpers.arrays("med")


@pytest.fixture(scope="module")
def encoder():
  return {"params": helpers.params("blip_base")["text_encoder"]}


@pytest.fixture(scope="module")
def decoder():
  return {"params": helpers.params("blip_decoder")["text_decoder"]}


def look_at(module, variables, golden):
  """Cross-attention keys and values, and the mask over them."""
  states = golden["encoder_hidden_states"]
  kv = module.apply(variables, states, method="encoder_kv")
  return kv, golden["encoder_attention_mask"]


def test_text_mode(golden, encoder):
  hidden = ENCODER.apply(encoder, golden["input_ids"], golden["attention_mask"])
  np.testing.assert_allclose(hidden, golden["text.hidden2"], atol=1e-5)


def test_multimodal_mode(golden, encoder):
  kv, mask = look_at(ENCODER, encoder, golden)
  hidden = ENCODER.apply(
    encoder, golden["input_ids"], golden["attention_mask"], kv, mask
  )
  np.testing.assert_allclose(hidden, golden["multimodal.hidden2"], atol=1e-5)


def test_causal_mode(golden, encoder):
  kv, mask = look_at(ENCODER, encoder, golden)
  hidden = ENCODER.apply(
    encoder,
    golden["input_ids"],
    golden["attention_mask"],
    kv,
    mask,
    causal=True,
  )
  expected = golden["multimodal_causal.last"]
  np.testing.assert_allclose(hidden, expected, atol=1e-5)


def decode(decoder, golden, kv, mask):
  hidden = DECODER.apply(
    decoder,
    golden["input_ids"],
    golden["attention_mask"],
    kv,
    mask,
    causal=True,
  )
  return DECODER.apply(decoder, hidden, method="logits")


def test_decoder_logits_and_loss(golden, decoder):
  logits = decode(decoder, golden, *look_at(DECODER, decoder, golden))
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  close(logits, golden["dec.logits"])
  close(logits[:, :-1], golden["dec.return_logits"])
  labels = golden["dec.labels"]
  mean = losses.lm_loss(logits, labels, label_smoothing=0.1)
  np.testing.assert_allclose(mean, golden["dec.loss_mean"], rtol=1e-5)
  sums = losses.lm_loss_per_text(logits, labels, label_smoothing=0.1)
  np.testing.assert_allclose(sums, golden["dec.loss_none"], rtol=1e-5)


def test_decoder_without_image(golden, decoder):
  logits = decode(decoder, golden, None, None)
  np.testing.assert_allclose(
    logits, golden["dec_text.logits"], rtol=1e-5, atol=1e-5
  )


def test_cached_decoding(golden, decoder):
  """A prompt of three tokens, then one at a time."""
  kv, mask = look_at(DECODER, decoder, golden)
  ids = golden["input_ids"]
  cache = DECODER.apply(decoder, len(ids), 10, method="init_cache")
  steps = []
  for start, end in [(0, 3), *((i, i + 1) for i in range(3, 8))]:
    hidden, cache = DECODER.apply(
      decoder, ids[:, start:end], cache, kv, mask, method="extend"
    )
    logits = DECODER.apply(decoder, hidden[:, -1:], method="logits")
    steps.append(logits[:, 0])
  # As all logits here: some are of 7, and a CPU's order of sums has its say.
  np.testing.assert_allclose(
    jnp.stack(steps, axis=1),
    golden["dec_cached.logits"],
    rtol=1e-5,
    atol=1e-5,
  )
  assert cache.length == 8
  key, value = cache.kv[0][0][:, :, :8, 0], cache.kv[1][1][:, :, :8, 0]
  np.testing.assert_allclose(key, golden["dec_cached.past_key_l0"], atol=1e-5)
  np.testing.assert_allclose(
    value, golden["dec_cached.past_value_l1"], atol=1e-5
  )


def test_texts_of_one_image_go_on_from_each_other(golden, decoder):
  """With a prompt in common; as each does alone, whatever its ancestors."""
  kv, mask = look_at(DECODER, decoder, golden)
  extend = jax.jit(functools.partial(DECODER.apply, method="extend"))
  images, prompt = len(golden["input_ids"]), golden["input_ids"][:, :2]
  room = functools.partial(
    DECODER.apply, decoder, images, 8, method="init_cache"
  )
  words = jax.random.randint(jax.random.key(0), (4, images, 3), 5, 20)
  # The first dies out, the last goes on twice; then all go on from one.
  ancestors = jnp.array([[2, 1, 2], [0, 1, 2], [1, 1, 1], [1, 2, 0]])
  _, cache = extend(decoder, prompt, room(3), kv, mask)
  texts = jnp.repeat(prompt[:, None], 3, axis=1)
  for new, came_from in zip(words, ancestors, strict=True):
    hidden, cache = extend(decoder, new.reshape(-1, 1), cache, kv, mask)
    written = jnp.concatenate([texts, new[..., None]], axis=2)
    texts = written[:, came_from]
    cache = cache._replace(ancestors=cache.ancestors[:, came_from])
  for text in range(3):
    alone, _ = extend(decoder, written[:, text], room(1), kv, mask)
    np.testing.assert_allclose(
      hidden.reshape(images, 3, -1)[:, text], alone[:, -1], atol=1e-5
    )


def test_texts_of_one_image_share_its_keys(golden, encoder):
  """Three texts an image, without copying the image, equal three copies."""
  kv, _ = look_at(ENCODER, encoder, golden)
  ids = jnp.repeat(golden["input_ids"], 3, axis=0)[::-1]
  mask = jnp.repeat(golden["attention_mask"], 3, axis=0)[::-1]
  folded = ENCODER.apply(encoder, ids, mask, kv)
  copies = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), kv)
  np.testing.assert_allclose(
    folded, ENCODER.apply(encoder, ids, mask, copies), atol=1e-5
  )


def test_causality_through_gradients(decoder, golden):
  """No token may move the scores that come before it."""
  kv, _ = look_at(DECODER, decoder, golden)

  def score(table, position):
    params = {**decoder["params"], "position_embeddings": table}
    ids = golden["input_ids"]
    hidden = DECODER.apply(
      {"params": params}, ids, jnp.ones_like(ids), kv, causal=True
    )
    return hidden[:, position].sum()

  table = decoder["params"]["position_embeddings"]
  moved = jnp.abs(jax.grad(score)(table, 4)).sum(axis=1) > 0
  np.testing.assert_array_equal(moved[:12], np.arange(12) <= 4)


def test_too_long_text(encoder):
  ids = jnp.ones((1, 65), jnp.int32)
  with pytest.raises(ValueError, match="only 64 positions"):
    ENCODER.apply(encoder, ids, ids)


def test_dropout_is_active_only_in_training(golden, encoder):
  cfg = dataclasses.replace(helpers.MED, dropout=0.1)
  args = encoder, golden["input_ids"], golden["attention_mask"]
  still = med.Med(cfg).apply(*args)
  np.testing.assert_allclose(still, golden["text.hidden2"], atol=1e-5)
  moving = med.Med(cfg).apply(
    *args, deterministic=False, rngs={"dropout": jax.random.key(0)}
  )
  assert np.abs(moving - still).max() > 1e-2


def test_tie_and_drop_tied_are_inverse():
  params = helpers.params("blip_pretrain")
  stored = med.drop_tied(params)
  assert "word_embeddings" not in stored["text_decoder"]
  assert "crossattention" not in stored["text_decoder"]["layer_0"]
  assert "ln" in stored["text_decoder"]["layer_0"]["attention"]
  full = med.tie(stored)
  # The original's checkpoint holds every tied tensor under both names.
  jax.tree.map(np.testing.assert_array_equal, full, params)


@pytest.mark.parametrize("policy", config.REMAT_POLICIES)
def test_remat_changes_memory_not_numbers(golden, encoder, policy):
  kv, _ = look_at(ENCODER, encoder, golden)
  module = med.Med(dataclasses.replace(helpers.MED, remat=policy))

  def loss(variables, module=module):
    ids, mask = golden["input_ids"], golden["attention_mask"]
    return jnp.sum(module.apply(variables, ids, mask, kv) ** 2)

  expected = jax.grad(lambda v: loss(v, ENCODER))(encoder)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
    jax.grad(loss)(encoder),
    expected,
  )
  recomputes = "remat" in str(jax.make_jaxpr(loss)(encoder))
  assert recomputes == (policy != "none")
