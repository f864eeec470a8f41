"""The text tower in its three modes against the original (golden `med`)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.models import config, med, tying
from blip_jax.tasks import losses
from tests import helpers

ENCODER = med.Med(helpers.MED, helpers.VIT.width)
DECODER = med.Med(helpers.MED, helpers.VIT.width, with_lm_head=True)


@functools.lru_cache
def compiled(module, method=None):
  """A method as one program, instead of one for each operation."""
  apply = functools.partial(module.apply, method=method)
  return jax.jit(apply, static_argnames=("causal", "deterministic"))


encode, extend = compiled(ENCODER), compiled(DECODER, "extend")
predict = compiled(DECODER, "predict")


@pytest.fixture(scope="module")
def golden():
  return helpers.arrays("med")


@pytest.fixture(scope="module")
def encoder():
  return {"params": helpers.params("blip_base")["text_encoder"]}


@pytest.fixture(scope="module")
def decoder():
  return {"params": helpers.params("blip_decoder")["text_decoder"]}


def encoder_kv(module, variables, golden):
  """Cross-attention keys and values, and the mask over them."""
  states = golden["encoder_hidden_states"]
  kv = compiled(module, "encoder_kv")(variables, states)
  return kv, golden["encoder_attention_mask"]


def test_text_mode(golden, encoder):
  hidden = encode(encoder, golden["input_ids"], golden["attention_mask"])
  np.testing.assert_allclose(hidden, golden["text.hidden2"], atol=1e-5)


def test_multimodal_mode(golden, encoder):
  kv, mask = encoder_kv(ENCODER, encoder, golden)
  hidden = encode(
    encoder, golden["input_ids"], golden["attention_mask"], kv, mask
  )
  np.testing.assert_allclose(hidden, golden["multimodal.hidden2"], atol=1e-5)


def test_causal_mode(golden, encoder):
  kv, mask = encoder_kv(ENCODER, encoder, golden)
  hidden = encode(
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
  # As one program, with newer versions of JAX, it is at the edge of rtol.
  hidden = DECODER.apply(
    decoder,
    golden["input_ids"],
    golden["attention_mask"],
    kv,
    mask,
    causal=True,
  )
  return predict(decoder, hidden)


def test_decoder_logits_and_loss(golden, decoder):
  kv, mask = encoder_kv(DECODER, decoder, golden)
  predicted = decode(decoder, golden, kv, mask)
  logits = np.asarray(predicted.logits())
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  close(logits, golden["dec.logits"])
  close(logits[:, :-1], golden["dec.return_logits"])
  labels = golden["dec.labels"]
  lm_loss = functools.partial(losses.lm_loss, label_smoothing=0.1)
  mean = jax.jit(lm_loss)(predicted, labels)
  np.testing.assert_allclose(mean.smoothed, golden["dec.loss_mean"], rtol=1e-5)
  sums = helpers.lm_loss_per_text(logits, labels, label_smoothing=0.1)
  np.testing.assert_allclose(sums, golden["dec.loss_none"], rtol=1e-5)


def test_decoder_without_image(golden, decoder):
  logits = decode(decoder, golden, None, None).logits()
  np.testing.assert_allclose(
    logits, golden["dec_text.logits"], rtol=1e-5, atol=1e-5
  )


def test_cached_decoding(golden, decoder):
  """A prompt of three tokens, then one at a time."""
  kv, mask = encoder_kv(DECODER, decoder, golden)
  ids = np.asarray(golden["input_ids"])
  cache = DECODER.apply(decoder, len(ids), 10, method="init_cache")
  steps = []
  for start, end in [(0, 3), *((i, i + 1) for i in range(3, 8))]:
    hidden, cache = extend(decoder, ids[:, start:end], cache, kv, mask)
    predicted = predict(decoder, np.asarray(hidden)[:, -1:])
    steps.append(np.asarray(predicted.logits())[:, 0])
  # Some logits are as large as 7, and CPUs differ in the order of sums.
  np.testing.assert_allclose(
    np.stack(steps, axis=1),
    golden["dec_cached.logits"],
    rtol=1e-5,
    atol=1e-5,
  )
  assert cache.length == 8
  keys, values = map(np.asarray, cache.kv[0])
  key, value = keys[0, :, :, :8, 0], values[1, :, :, :8, 0]
  np.testing.assert_allclose(key, golden["dec_cached.past_key_l0"], atol=1e-5)
  np.testing.assert_allclose(
    value, golden["dec_cached.past_value_l1"], atol=1e-5
  )


def test_cached_texts_can_continue_each_other(golden, decoder):
  """Texts of one image share a prompt; each gets the hidden states that it
  would get alone, whichever texts it has continued."""
  kv, mask = encoder_kv(DECODER, decoder, golden)
  prompt = np.asarray(golden["input_ids"])[:, :2]
  images = len(prompt)
  init_cache = functools.partial(
    DECODER.apply, decoder, images, 8, method="init_cache"
  )
  words = np.random.default_rng(0).integers(5, 20, (4, images, 3))
  # The first text is dropped, the last is continued twice; later, all continue
  # the same one.
  ancestors = [[2, 1, 2], [0, 1, 2], [1, 1, 1], [1, 2, 0]]
  _, cache = extend(decoder, prompt, init_cache(3), kv, mask)
  texts = np.repeat(prompt[:, None], 3, axis=1)
  for new, parents in zip(words, ancestors, strict=True):
    hidden, cache = extend(decoder, new.reshape(-1, 1), cache, kv, mask)
    extended = np.concatenate([texts, new[..., None]], axis=2)
    texts = extended[:, parents]
    cache = cache._replace(ancestors=np.asarray(cache.ancestors)[:, parents])
  hidden = np.asarray(hidden).reshape(images, 3, -1)
  for text in range(3):
    alone, _ = extend(decoder, extended[:, text], init_cache(1), kv, mask)
    np.testing.assert_allclose(
      hidden[:, text], np.asarray(alone)[:, -1], atol=1e-5
    )


def test_texts_share_the_keys_of_their_image(golden, encoder):
  """Three texts per image give the same result as three copies of the image."""
  kv, _ = encoder_kv(ENCODER, encoder, golden)
  ids = np.repeat(np.asarray(golden["input_ids"]), 3, axis=0)[::-1]
  mask = np.repeat(np.asarray(golden["attention_mask"]), 3, axis=0)[::-1]
  folded = encode(encoder, ids, mask, kv)
  copies = jax.tree.map(lambda x: np.repeat(np.asarray(x), 3, axis=1), kv)
  np.testing.assert_allclose(
    folded, encode(encoder, ids, mask, copies), atol=1e-5
  )


def test_causality_through_gradients(decoder, golden):
  """A token has no influence on the hidden states before it."""
  kv, _ = encoder_kv(DECODER, decoder, golden)

  def score(table, position):
    params = {**decoder["params"], "position_embeddings": table}
    ids = golden["input_ids"]
    hidden = DECODER.apply(
      {"params": params}, ids, jnp.ones_like(ids), kv, causal=True
    )
    return hidden[:, position].sum()

  table = decoder["params"]["position_embeddings"]
  gradient = jax.jit(jax.grad(score), static_argnums=1)(table, 4)
  influences = np.abs(gradient).sum(axis=1) > 0
  np.testing.assert_array_equal(influences[:12], np.arange(12) <= 4)


def test_a_text_longer_than_the_position_embeddings(encoder):
  ids = jnp.ones((1, 65), jnp.int32)
  with pytest.raises(ValueError, match="only 64 positions"):
    ENCODER.apply(encoder, ids, ids)


def test_dropout_is_active_only_in_training(golden, encoder):
  cfg = dataclasses.replace(helpers.MED, dropout=0.1)
  args = encoder, golden["input_ids"], golden["attention_mask"]
  encode = compiled(med.Med(cfg, helpers.VIT.width))
  deterministic = encode(*args)
  np.testing.assert_allclose(deterministic, golden["text.hidden2"], atol=1e-5)
  dropped = encode(
    *args, deterministic=False, rngs={"dropout": jax.random.key(0)}
  )
  difference = np.asarray(dropped) - np.asarray(deterministic)
  assert np.abs(difference).max() > 1e-2


def test_tie_and_drop_tied_are_inverse():
  params = helpers.params("blip_pretrain")
  stored = tying.drop_tied(params)
  assert "word_embeddings" not in stored["text_decoder"]
  assert "crossattention" not in stored["text_decoder"]["layers"]
  assert "ln" in stored["text_decoder"]["layers"]["attention"]
  full = tying.tie(stored)
  # The original's checkpoint contains every tied tensor under both names.
  jax.tree.map(np.testing.assert_array_equal, full, params)


def squares(module, golden, kv):
  """A function of the encoder's variables."""
  ids, mask = golden["input_ids"], golden["attention_mask"]
  return lambda encoder: jnp.sum(module.apply(encoder, ids, mask, kv) ** 2)


@pytest.fixture(scope="module")
def gradients(golden, encoder):
  kv, _ = encoder_kv(ENCODER, encoder, golden)
  return jax.jit(jax.grad(squares(ENCODER, golden, kv)))(encoder)


@pytest.mark.parametrize("policy", config.REMAT_POLICIES)
def test_remat_does_not_change_gradients(golden, encoder, gradients, policy):
  kv, _ = encoder_kv(ENCODER, encoder, golden)
  module = med.Med(
    dataclasses.replace(helpers.MED, remat=policy), helpers.VIT.width
  )
  loss = squares(module, golden, kv)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
    jax.jit(jax.grad(loss))(encoder),
    gradients,
  )
  recomputes = "remat" in str(jax.make_jaxpr(loss)(encoder))
  assert recomputes == (policy != "none")
