"""Decoding settings, and the processing of next-token scores."""

import jax
import numpy as np
import pytest

from blip_jax.models import decoding

process = jax.jit(decoding.process, static_argnames="sep_id")
nucleus = jax.jit(decoding.nucleus)


def test_repetition_penalty_by_hand():
  scores = np.array([[3.0, -2.0, 1.0, 0.5, 4.0, -1.0]])
  ids = np.array([[2, 1, 4, 0, 0]])
  settings = decoding.Decoding(min_length=0, repetition_penalty=2.0)
  processed = process(scores, ids, np.int32(2), settings, sep_id=3)
  # Tokens 2 and 1 are in the text; 4 and 0 come after it.
  np.testing.assert_array_equal(processed, [[3.0, -4.0, 0.5, 0.5, 4.0, -1.0]])


def test_nucleus_by_hand():
  """The most likely tokens until their sum exceeds top_p, after temperature
  and top_k."""
  probs = np.array([[0.1, 0.4, 0.05, 0.3, 0.15]])

  def kept(**options):
    found = nucleus(np.log(probs), decoding.Decoding(**options))
    (scores,), (tokens,) = map(np.asarray, found)
    return {*tokens[np.isfinite(scores)].tolist()}

  assert kept(top_p=0.01) == {1}
  assert kept(top_p=0.5) == {1, 3}
  assert kept(top_p=0.75) == {1, 3, 4}
  assert kept() == {0, 1, 2, 3, 4}
  assert kept(top_k=2) == {1, 3}
  # Of the two tokens that top_k keeps, the first has probability 0.57.
  assert kept(top_k=2, top_p=0.55) == {1}
  # A low temperature makes the most likely token more likely.
  assert kept(top_p=0.5, temperature=0.1) == {1}


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
    (dict(temperature=1e-40), "temperature: .* from 1e-12 to 1e\\+12, found"),
    (dict(repetition_penalty=1e300), "repetition_penalty: .*, found 1e\\+300"),
    (dict(temperature=float("nan")), "temperature: .*, found nan"),
    (dict(temperature="hot"), "temperature: .*, found 'hot'"),
    (dict(top_k=2.5), "top_k: expected a whole number, found 2.5"),
    (dict(num_beams="3"), "num_beams: expected a whole number, found '3'"),
    (dict(num_beams=None), "num_beams: expected a whole number, found None"),
    (dict(max_length=float("inf")), "max_length: expected a whole number"),
    (dict(length_norm="none"), "length_norm: expected one of"),
    (dict(beams=3), "beams: no such decoding option"),
    (dict(max_new_tokens=3, max_length=9), "give only one of them"),
    (dict(max_new_tokens=0), "max_new_tokens: expected 1 or more"),
  ],
)
def test_impossible_options_are_refused(options, message):
  defaults = dict(num_beams=3, max_length=20, min_length=5)
  with pytest.raises(ValueError, match=message):
    decoding.make(defaults, 4, 64, **options)


def test_sampling_defaults_are_the_originals():
  defaults = dict(num_beams=3, max_length=20, min_length=5)
  settings = decoding.make(defaults, 4, 64, sample=True)
  assert (settings.num_beams, settings.top_k, settings.top_p) == (1, 50, 0.9)
  assert settings.repetition_penalty == 1.1
  settings = decoding.make(defaults, 4, 64, sample=True, top_k=0)
  assert settings.top_k == 0


def test_max_new_tokens_counts_after_the_prompt():
  defaults = dict(num_beams=3, max_length=20, min_length=5)
  settings = decoding.make(defaults, 9, 64, max_new_tokens=2)
  assert (settings.max_length, settings.min_length) == (11, 5)


def test_lengths_are_rounded_up_to_share_programs():
  sizes = [decoding.num_positions_for(n, 20) for n in (1, 8, 9, 16, 17, 20)]
  assert sizes == [8, 8, 16, 16, 20, 20]


def test_defaults_are_those_of_the_originals_functions():
  d = decoding.Decoding()
  assert (d.max_length, d.min_length, d.num_beams) == (30, 10, 3)
  assert (d.repetition_penalty, d.temperature, d.top_p) == (1.0, 1.0, 1.0)
  assert (d.num_return_sequences, d.sample) == (1, False)
  assert (d.top_k, d.no_repeat_ngram_size) == (0, 0)
  assert d.length_norm == "full"


DEFAULTS = dict(num_beams=3, max_length=20, min_length=5)


@pytest.mark.parametrize(
  "options",
  [
    dict(max_length=5, min_length=0),  # one token after a prompt of 4
    dict(max_length=64),
    dict(min_length=20),
    dict(min_length=0),
    dict(num_return_sequences=3),
    dict(num_beams=1),
    dict(top_p=1.0),
    dict(top_k=0),
    dict(sample=True, num_return_sequences=9),
    dict(sample=True, num_beams=1),
    dict(max_new_tokens=1),
    dict(max_new_tokens=60),
    dict(no_repeat_ngram_size=1),
  ],
)
def test_options_at_their_limits_are_allowed(options):
  settings = decoding.make(DEFAULTS, 4, 64, **options)
  for name, value in options.items():
    if name != "max_new_tokens":
      assert getattr(settings, name) == value


@pytest.mark.parametrize(
  "options",
  [
    dict(max_length=4),
    dict(max_length=65),
    dict(max_new_tokens=61),
    dict(min_length=-1),
    dict(top_k=-1),
    dict(no_repeat_ngram_size=-1),
    dict(num_return_sequences=0),
    dict(repetition_penalty=0.0),
    dict(repetition_penalty=float("inf")),
    dict(temperature=-1.0),
    dict(temperature=float("nan")),
    dict(top_p=0.0),
  ],
)
def test_options_beyond_their_limits_are_refused(options):
  with pytest.raises(ValueError, match="|".join(("max_length", *options))):
    decoding.make(DEFAULTS, 4, 64, **options)


def test_a_maximum_below_the_default_minimum_lowers_the_minimum():
  settings = decoding.make(
    dict(max_length=20, min_length=10), 1, 64, max_length=7
  )
  assert (settings.max_length, settings.min_length) == (7, 7)
  settings = decoding.make(dict(max_length=20, min_length=10), 1, 64)
  assert settings.min_length == 10


def test_sampling_replaces_defaults_and_not_options():
  settings = decoding.make(
    dict(num_beams=3, repetition_penalty=1.5), 1, 64, sample=True, top_p=0.5
  )
  assert (settings.num_beams, settings.top_k, settings.top_p) == (1, 50, 0.5)
  assert settings.repetition_penalty == 1.1
  greedy = decoding.make(
    dict(num_beams=3, repetition_penalty=1.5), 1, 64, sample=False
  )
  assert (greedy.num_beams, greedy.top_k, greedy.top_p) == (3, 0, 1.0)
  assert greedy.repetition_penalty == 1.5


@pytest.mark.parametrize(
  "position, allowed", [(3, False), (4, False), (5, True)]
)
def test_sep_is_allowed_from_the_minimum_length_on(position, allowed):
  scores = np.zeros((1, 6))
  ids = np.full((1, 8), 5)
  settings = decoding.Decoding(min_length=5)
  processed = process(scores, ids, np.int32(position), settings, 3)
  (finite,) = np.isfinite(processed)
  assert finite[3] == allowed
  assert np.delete(finite, 3).all()


@pytest.mark.parametrize(
  "n, position, banned",
  [
    # The text is 4 5 4 5 4, of which the first tokens count.
    (1, 2, {4, 5}),
    (1, 0, set()),
    (2, 2, set()),
    (2, 3, {5}),
    (2, 4, {4}),
    (3, 3, set()),
    (3, 4, {4}),
    (3, 5, {5}),
    (4, 5, {5}),
    (4, 3, set()),
    (9, 5, set()),
  ],
)
def test_tokens_that_would_repeat_an_ngram_are_banned(n, position, banned):
  ids = np.array([[4, 5, 4, 5, 4, 0, 0, 0]])
  settings = decoding.Decoding(min_length=0, no_repeat_ngram_size=n)
  processed = process(
    np.zeros((1, 7)), ids, np.int32(position), settings, sep_id=3
  )
  assert {*np.flatnonzero(np.isinf(processed)).tolist()} == banned


def test_a_penalty_of_a_score_of_zero_changes_nothing():
  ids = np.array([[0, 1, 2]])
  scores = np.array([[0.0, 2.0, -2.0]])
  settings = decoding.Decoding(min_length=0, repetition_penalty=4.0)
  processed = process(scores, ids, np.int32(3), settings, sep_id=0)
  np.testing.assert_array_equal(processed, [[0.0, 0.5, -8.0]])


def test_nucleus_scores_are_sorted_and_divided_by_the_temperature():
  scores = np.array([[1.0, 4.0, 2.0]])
  found, tokens = nucleus(scores, decoding.Decoding(temperature=2.0, top_k=2))
  np.testing.assert_array_equal(tokens, [[1, 2]])
  np.testing.assert_allclose(found, [[2.0, 1.0]])
  # More candidates than there are tokens are all tokens.
  found, tokens = nucleus(scores, decoding.Decoding(top_k=99))
  np.testing.assert_array_equal(tokens, [[1, 2, 0]])


def test_programs_are_compiled_for_multiples_of_eight_positions():
  sizes = {n: decoding.num_positions_for(n, 512) for n in (1, 8, 9, 20, 512)}
  assert sizes == {1: 8, 8: 8, 9: 16, 20: 24, 512: 512}
