"""Text generation with a toy model: a table of logits by last token, for which
all texts can be enumerated.  tests/parity compares with the original.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.models import blip, decoding, generation
from blip_jax.models import cache as cache_lib
from tests import helpers

PAD, SEP, DEC = 0, 1, 2
VOCAB, POSITIONS = 6, 8


def table(seed=0, images=3):
  """Next-token logits: [image, last token, token]."""
  key = jax.random.key(seed)
  return 2 * np.asarray(jax.random.normal(key, (images, VOCAB, VOCAB)))


def search(*args, **kwargs):
  """Texts of a decoder whose logits depend on the last token alone."""
  return jax.device_get(_search(*args, **kwargs))


@functools.partial(jax.jit, static_argnames=("prompt_length", "num_positions"))
def _search(
  scores, settings, prompt_length=1, num_positions=POSITIONS, keys=None
):

  def extend(ids, cache):
    texts_per_image = len(ids) // len(scores)
    by_text = jnp.repeat(scores, texts_per_image, axis=0)
    logits = by_text[jnp.arange(len(ids)), ids[:, -1]]
    return logits, cache._replace(length=cache.length + ids.shape[1])

  run = generation._Generator(extend, settings, prompt_length, SEP, PAD)
  ids = jnp.zeros((len(scores), num_positions), jnp.int32)
  ids = ids.at[:, :prompt_length].set(DEC)
  texts_per_image = max(settings.num_beams, settings.num_return_sequences)
  ancestors = jnp.zeros(
    (len(scores), texts_per_image, num_positions), jnp.int32
  )
  empty = cache_lib.Cache((), ancestors, jnp.int32(0))
  logits, cache = extend(ids[:, :prompt_length], empty)
  if settings.num_beams > 1:
    return run.beam_search(ids, logits, cache)
  pick = generation._most_likely
  if settings.sample:
    pick = generation._sampler(keys, settings)
  return run.token_by_token(ids, logits, cache, pick)


def log_prob(scores, text):
  log_probs = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
  pairs = itertools.pairwise([DEC, *text])
  return sum(float(log_probs[last, token]) for last, token in pairs)


def every_text(max_length, prompt_length=1):
  """All texts that end with [SEP] or at `max_length`."""
  words = [token for token in range(VOCAB) if token != SEP]
  max_new_tokens = max_length - prompt_length
  for length in range(max_new_tokens):
    for text in itertools.product(words, repeat=length):
      yield (*text, SEP)
  yield from itertools.product(words, repeat=max_new_tokens)


@pytest.mark.parametrize("norm", decoding.LENGTH_NORMS)
def test_beam_search_with_a_beam_for_every_prefix_is_exhaustive(norm):
  """Its results are the best of all texts, by log-probability per token."""
  max_length, prompt_length, scores = 5, 2, table()
  settings = decoding.Decoding(
    max_length=max_length,
    min_length=0,
    num_beams=200,
    num_return_sequences=3,
    length_norm=norm,
  )

  # The top 2k next tokens are needed, so the vocabulary must be larger.
  wide = np.pad(scores, ((0, 0), (0, 0), (0, 500)), constant_values=-1e9)
  generated = search(wide, settings, prompt_length, max_length)
  for image, image_scores in enumerate(scores):
    expected = {}
    for text in every_text(max_length, prompt_length):
      length = len(text)
      if norm == "full":
        length += prompt_length - (text[-1] == SEP)
      expected[text] = log_prob(image_scores, text) / length
    best = sorted(expected, key=expected.get, reverse=True)[:3]
    for ids, score, text in zip(
      generated.ids[image], generated.scores[image], best, strict=True
    ):
      assert tuple(ids[prompt_length:].tolist()[: len(text)]) == text
      assert not ids[prompt_length + len(text) :].any()
      np.testing.assert_allclose(score, expected[text], rtol=1e-5)


def test_token_log_probs_are_not_processed():
  """Repetition penalty and minimum length do not change them."""
  scores = table(1)
  settings = decoding.Decoding(
    max_length=7,
    min_length=4,
    num_beams=2,
    num_return_sequences=2,
    repetition_penalty=1.7,
  )
  for d in (settings, settings.replace(num_beams=1, num_return_sequences=1)):
    generated = search(scores, d)
    for image, row in itertools.product(
      range(3), range(d.num_return_sequences)
    ):
      text = generated.ids[image, row].tolist()[1:]
      text = text[: text.index(SEP) + 1] if SEP in text else text[:6]
      np.testing.assert_allclose(
        generated.token_log_probs[image, row].sum(),
        log_prob(scores[image], text),
        rtol=1e-5,
      )


def test_greedy_decoding_takes_the_most_likely_token_until_sep():
  scores = table(2)
  settings = decoding.Decoding(max_length=POSITIONS, min_length=0, num_beams=1)
  generated = search(scores, settings)
  for ids, image_scores in zip(
    generated.ids[:, 0].tolist(), scores, strict=True
  ):
    expected = [DEC]
    while len(expected) < POSITIONS and expected[-1] != SEP:
      expected.append(int(image_scores[expected[-1]].argmax()))
    assert ids == expected + [PAD] * (POSITIONS - len(expected))


def test_positions_beyond_the_maximum_length_change_nothing():
  scores = table(3)
  for beams in (1, 3):
    settings = decoding.Decoding(5, 0, num_beams=beams)
    short, long = (search(scores, settings, num_positions=n) for n in (5, 8))
    np.testing.assert_array_equal(short.ids, long.ids[..., :5])
    assert not long.ids[..., 5:].any()
    np.testing.assert_array_equal(short.scores, long.scores)


def test_no_text_ends_before_the_minimum_length():
  likely_to_end = table(4)
  likely_to_end[:, :, SEP] += 20
  for beams in (1, 2):
    settings = decoding.Decoding(POSITIONS, 5, num_beams=beams)
    ids = search(likely_to_end, settings).ids
    assert (ids[..., :5] != SEP).all() and (ids[..., 5] == SEP).all()


def test_no_ngram_is_repeated():
  scores = table(5)
  scores[:, :, SEP] -= 20
  for n, beams in itertools.product((1, 2, 3), (1, 2)):
    settings = decoding.Decoding(
      max_length=5 if n == 1 else POSITIONS,
      min_length=0,
      num_beams=beams,
      no_repeat_ngram_size=n,
    )
    for ids in search(scores, settings).ids[:, 0].tolist():
      text = ids[: settings.max_length]
      if SEP in text:
        text = text[: text.index(SEP) + 1]
      grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
      assert len(set(grams)) == len(grams), (n, text)


def test_samples_have_the_right_frequencies():
  scores = table(6, images=1)
  scores[:, :, SEP] = -1e9
  settings = decoding.Decoding(
    max_length=2,
    min_length=0,
    num_beams=1,
    sample=True,
    num_return_sequences=4000,
    temperature=1.3,
  )
  keys = jax.random.split(jax.random.key(0), 1)
  ids = search(scores, settings, num_positions=2, keys=keys).ids[0, :, 1]
  frequency = np.bincount(ids, minlength=VOCAB) / len(ids)
  expected = np.exp(scores[0, DEC] / 1.3)
  expected /= expected.sum()
  np.testing.assert_allclose(frequency, expected, atol=0.03)


MODEL = blip.Blip(helpers.BLIP)


@functools.lru_cache
def params_and_states():
  """A captioner with random weights, and image tokens of four images."""
  params = helpers.init("caption", helpers.BLIP, jax.random.key(0))
  # Texts differ, and end before the maximum length.
  params = helpers.sharper(params, 6)
  return params, jax.random.normal(jax.random.key(1), (4, 17, 48))


@jax.jit
def run(states, settings, keys=None):
  params, _ = params_and_states()
  prompt = jnp.array([5, 6, 7])
  return generation.generate(MODEL, params, states, prompt, settings, 16, keys)


@pytest.mark.parametrize("method", ["greedy", "beams", "samples"])
def test_an_image_alone_gets_the_same_texts_as_in_a_batch(method):
  settings = {
    "greedy": decoding.Decoding(12, 0, num_beams=1),
    "beams": decoding.Decoding(12, 0, num_return_sequences=2),
    "samples": decoding.Decoding(
      12, 0, num_beams=1, sample=True, num_return_sequences=3
    ),
  }[method]
  _, states = params_and_states()
  keys = jax.random.split(jax.random.key(2), 4)
  together = jax.device_get(run(states, settings, keys=keys))
  assert len(np.unique(together.ids[:, 0], axis=0)) > 1
  for i in (0, 3):
    alone = run(states[i : i + 1], settings, keys=keys[i : i + 1])
    alone = jax.device_get(alone)
    np.testing.assert_array_equal(alone.ids[0], together.ids[i])
    np.testing.assert_allclose(alone.scores[0], together.scores[i], rtol=1e-5)


def test_numeric_settings_change_without_recompilation():
  _, states = params_and_states()
  settings = decoding.Decoding(12, 0, num_beams=2)
  run(states, settings)
  compiled = run._cache_size()
  run(states, settings.replace(max_length=9, repetition_penalty=1.2))
  run(states, settings.replace(min_length=4))
  assert run._cache_size() == compiled


def test_image_keys_are_computed_once_and_never_copied():
  """No array of the program has image keys for every beam."""
  _, states = params_and_states()
  settings = decoding.Decoding(12, 0, num_beams=5)
  jaxpr = str(jax.make_jaxpr(run)(states, settings))
  assert "f32[4,17,4,16]" in jaxpr  # keys of 4 images
  assert "f32[20,17," not in jaxpr
  assert jaxpr.count("f32[4,17,64] = dot_general") == 4  # 2 layers, K and V
