"""Decoding settings, and the processing of next-token scores."""

import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.models import decoding


def test_repetition_penalty_by_hand():
  scores = jnp.array([[3.0, -2.0, 1.0, 0.5, 4.0, -1.0]])
  ids = jnp.array([[2, 1, 4, 0, 0]])
  settings = decoding.Decoding(min_length=0, repetition_penalty=2.0)
  processed = decoding.process(scores, ids, jnp.int32(2), settings, sep_id=3)
  # Tokens 2 and 1 are in the text; 4 and 0 come after it.
  np.testing.assert_array_equal(processed, [[3.0, -4.0, 0.5, 0.5, 4.0, -1.0]])


def test_nucleus_by_hand():
  """The most likely tokens until their sum exceeds top_p, after temperature
  and top_k."""
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
