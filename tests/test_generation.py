"""Decoding on a model that is a table, where all texts can be enumerated; the
goldens of the original are in test_parity.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.models import blip, decoding, families, generation, med
from tests import helpers

PAD, SEP, DEC = 0, 1, 2
VOCAB, ROOM = 6, 8


def table(seed=0, images=3):
  """Scores of the next token: [image, last token, token]."""
  return 2 * jax.random.normal(jax.random.key(seed), (images, VOCAB, VOCAB))


@functools.partial(jax.jit, static_argnames=("prompt_length", "room"))
def search(scores, settings, prompt_length=1, room=ROOM, keys=None):
  """Texts by a decoder that looks at the last token only."""

  def extend(ids, cache):
    each = len(ids) // len(scores)
    own = jnp.repeat(scores, each, axis=0)
    logits = own[jnp.arange(len(ids)), ids[:, -1]]
    return logits, cache._replace(length=cache.length + ids.shape[1])

  run = generation._Search(extend, settings, prompt_length, SEP, PAD)
  ids = jnp.zeros((len(scores), room), jnp.int32).at[:, :prompt_length].set(DEC)
  many = max(settings.num_beams, settings.num_return_sequences)
  nobody = jnp.zeros((len(scores), many, room), jnp.int32)
  empty = med.Cache((), nobody, jnp.int32(0))
  logits, cache = extend(ids[:, :prompt_length], empty)
  if settings.num_beams > 1:
    return run.beams(ids, logits, cache)
  pick = generation._likeliest
  if settings.sample:
    pick = generation._drawing(keys, settings)
  return run.walk(ids, logits, cache, pick)


def log_prob(scores, text):
  log_probs = jax.nn.log_softmax(scores)
  pairs = itertools.pairwise([DEC, *text])
  return sum(float(log_probs[last, token]) for last, token in pairs)


def every_text(max_length, prompt_length=1):
  """Those that end with [SEP] or at `max_length`."""
  words = [token for token in range(VOCAB) if token != SEP]
  room = max_length - prompt_length
  for length in range(room):
    for text in itertools.product(words, repeat=length):
      yield (*text, SEP)
  yield from itertools.product(words, repeat=room)


@pytest.mark.parametrize("norm", decoding.LENGTH_NORMS)
def test_beams_enough_for_all_texts_find_the_best(norm):
  """With a beam for every prefix, nothing is lost: the ranking is that of all
  texts, each divided by its length, [SEP] included or not."""
  max_length, prompt_length, scores = 5, 2, table()
  settings = decoding.Decoding(
    max_length=max_length,
    min_length=0,
    num_beams=200,
    num_return_sequences=3,
    length_norm=norm,
  )

  # Top-2k of so few tokens needs a wider vocabulary.
  wide = jnp.pad(scores, ((0, 0), (0, 0), (0, 500)), constant_values=-1e9)
  found = search(wide, settings, prompt_length, max_length)
  for image, of_image in enumerate(scores):
    ranks = {}
    for text in every_text(max_length, prompt_length):
      length = len(text)
      if norm == "full":
        length += prompt_length - (text[-1] == SEP)
      ranks[text] = log_prob(of_image, text) / length
    best = sorted(ranks, key=ranks.get, reverse=True)[:3]
    for ids, score, text in zip(
      found.ids[image], found.scores[image], best, strict=True
    ):
      assert tuple(ids[prompt_length:].tolist()[: len(text)]) == text
      assert not ids[prompt_length + len(text) :].any()
      np.testing.assert_allclose(score, ranks[text], rtol=1e-5)


def test_log_probs_are_the_models_own():
  """Of each token; penalties and minimal lengths do not change them."""
  scores = table(1)
  settings = decoding.Decoding(
    max_length=7,
    min_length=4,
    num_beams=2,
    num_return_sequences=2,
    repetition_penalty=1.7,
  )
  for d in (settings, settings.replace(num_beams=1, num_return_sequences=1)):
    found = search(scores, d)
    for image, row, texts in itertools.product(
      range(3), range(d.num_return_sequences), [found]
    ):
      ids = texts.ids[image, row].tolist()
      text = ids[1:]
      text = text[: text.index(SEP) + 1] if SEP in text else text[:6]
      np.testing.assert_allclose(
        texts.token_log_probs[image, row].sum(),
        log_prob(scores[image], text),
        rtol=1e-5,
      )


def test_greedy_takes_the_likeliest_until_sep():
  scores = table(2)
  settings = decoding.Decoding(max_length=ROOM, min_length=0, num_beams=1)
  found = search(scores, settings)
  for ids, of_image in zip(found.ids[:, 0].tolist(), scores, strict=True):
    expected = [DEC]
    while len(expected) < ROOM and expected[-1] != SEP:
      expected.append(int(of_image[expected[-1]].argmax()))
    assert ids == expected + [PAD] * (ROOM - len(expected))


def test_room_beyond_the_maximal_length_changes_nothing():
  scores = table(3)
  for beams in (1, 3):
    settings = decoding.Decoding(5, 0, num_beams=beams)
    short, long = (search(scores, settings, room=room) for room in (5, 8))
    np.testing.assert_array_equal(short.ids, long.ids[..., :5])
    assert not long.ids[..., 5:].any()
    np.testing.assert_array_equal(short.scores, long.scores)


def test_no_text_ends_before_its_minimal_length():
  eager = table(4).at[:, :, SEP].add(20)
  for beams in (1, 2):
    settings = decoding.Decoding(ROOM, 5, num_beams=beams)
    ids = search(eager, settings).ids
    assert (ids[..., :5] != SEP).all() and (ids[..., 5] == SEP).all()


def test_no_ngram_comes_twice():
  scores = table(5).at[:, :, SEP].add(-20)
  for n, beams in itertools.product((1, 2, 3), (1, 2)):
    settings = decoding.Decoding(
      max_length=5 if n == 1 else ROOM,
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


def test_repetition_penalty_by_hand():
  scores = jnp.array([[3.0, -2.0, 1.0, 0.5, 4.0, -1.0]])
  ids = jnp.array([[2, 1, 4, 0, 0]])
  settings = decoding.Decoding(min_length=0, repetition_penalty=2.0)
  found = decoding.process(scores, ids, jnp.int32(2), settings, sep_id=3)
  # Tokens 2 and 1 are in the text; 4 and 0 are behind it.
  np.testing.assert_array_equal(found, [[3.0, -4.0, 0.5, 0.5, 4.0, -1.0]])


def test_nucleus_by_hand():
  """The likeliest until their sum exceeds top_p, after top_k and warmth."""
  probs = jnp.array([[0.1, 0.4, 0.05, 0.3, 0.15]])
  kept = lambda **kw: {
    int(token)
    for score, token in zip(
      *(
        x[0] for x in decoding.nucleus(jnp.log(probs), decoding.Decoding(**kw))
      ),
      strict=True,
    )
    if np.isfinite(score)
  }
  assert kept(top_p=0.01) == {1}
  assert kept(top_p=0.5) == {1, 3}
  assert kept(top_p=0.75) == {1, 3, 4}
  assert kept() == {0, 1, 2, 3, 4}
  assert kept(top_k=2) == {1, 3}
  # Of the two that top_k leaves, the first has 0.57.
  assert kept(top_k=2, top_p=0.55) == {1}
  # Cold makes the likeliest likelier.
  assert kept(top_p=0.5, temperature=0.1) == {1}


def test_draws_have_their_probabilities():
  scores = table(6, images=1).at[:, :, SEP].set(-1e9)
  settings = decoding.Decoding(
    max_length=2,
    min_length=0,
    num_beams=1,
    sample=True,
    num_return_sequences=4000,
    temperature=1.3,
  )
  keys = jax.random.split(jax.random.key(0), 1)
  ids = search(scores, settings, room=2, keys=keys).ids[0, :, 1]
  share = np.bincount(ids, minlength=VOCAB) / len(ids)
  expected = jax.nn.softmax(scores[0, DEC] / 1.3)
  np.testing.assert_allclose(share, expected, atol=0.03)


MODEL = blip.Blip(helpers.BLIP)


@functools.lru_cache
def real():
  params = families.init("caption", helpers.BLIP, jax.random.key(0))
  # Sharper, so that texts differ and end.
  params = jax.tree.map(lambda x: 6 * x if x.ndim == 2 else x, params)
  return params, jax.random.normal(jax.random.key(1), (4, 17, 48))


@functools.partial(jax.jit, static_argnames="room")
def run(states, settings, room=16, keys=None):
  return generation.generate(
    MODEL, real()[0], states, jnp.array([5, 6, 7]), settings, room, keys
  )


@pytest.mark.parametrize("how", ["greedy", "beams", "samples"])
def test_an_image_alone_is_as_in_a_batch(how):
  settings = {
    "greedy": decoding.Decoding(12, 0, num_beams=1),
    "beams": decoding.Decoding(12, 0, num_return_sequences=2),
    "samples": decoding.Decoding(
      12, 0, num_beams=1, sample=True, num_return_sequences=3
    ),
  }[how]
  _, states = real()
  keys = jax.random.split(jax.random.key(2), 4)
  together = run(states, settings, keys=keys)
  assert len(np.unique(together.ids[:, 0], axis=0)) > 1
  for i in (0, 3):
    alone = run(states[i : i + 1], settings, keys=keys[i : i + 1])
    np.testing.assert_array_equal(alone.ids[0], together.ids[i])
    np.testing.assert_allclose(alone.scores[0], together.scores[i], rtol=1e-5)


def test_numbers_may_change_without_another_compilation():
  _, states = real()
  settings = decoding.Decoding(12, 0, num_beams=2)
  run(states, settings)
  compiled = run._cache_size()
  run(states, settings.replace(max_length=9, repetition_penalty=1.2))
  run(states, settings.replace(min_length=4))
  assert run._cache_size() == compiled


def test_the_image_is_projected_once_and_never_copied():
  """No array of the program has a row of image keys for every beam."""
  _, states = real()
  settings = decoding.Decoding(12, 0, num_beams=5)
  jaxpr = str(jax.make_jaxpr(run)(states, settings))
  assert "f32[4,17,4,16]" in jaxpr  # keys of 4 images
  assert "f32[20,17," not in jaxpr
  assert jaxpr.count("f32[4,17,64] = dot_general") == 4  # 2 layers, K and V


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(num_beams=0), "num_beams: expected 1 or more, found 0"),
    (dict(min_length=21), "min_length: 21 is more than max_length, 20"),
    (dict(max_length=4), "max_length: 4 tokens leave no room after a prompt"),
    (dict(max_length=99), "decoder has only 64 positions"),
    (dict(num_return_sequences=4), "4 texts of an image from 3 beam"),
    (dict(sample=True, num_beams=2), "2 beams cannot be sampled"),
    (dict(top_p=1.5), "top_p: expected at most 1"),
    (dict(temperature=0.0), "temperature: expected a positive number"),
    (dict(length_norm="none"), "length_norm: expected one of"),
    (dict(beams=3), "beams: no such decoding option"),
    (dict(max_new_tokens=3, max_length=9), "give only one of them"),
    (dict(max_new_tokens=0), "max_new_tokens: expected 1 or more"),
  ],
)
def test_options_that_cannot_be(options, message):
  defaults = dict(num_beams=3, max_length=20, min_length=5)
  with pytest.raises(ValueError, match=message):
    decoding.make(defaults, 4, 64, **options)


def test_defaults_of_sampling_are_the_originals():
  defaults = dict(num_beams=3, max_length=20, min_length=5)
  found = decoding.make(defaults, 4, 64, sample=True)
  assert (found.num_beams, found.top_k, found.top_p) == (1, 50, 0.9)
  assert found.repetition_penalty == 1.1
  found = decoding.make(defaults, 4, 64, sample=True, top_k=0)
  assert found.top_k == 0
  found = decoding.make(defaults, 9, 64, max_new_tokens=2)
  assert (found.max_length, found.min_length) == (11, 5)
