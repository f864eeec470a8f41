"""Ranking a list of answers: a short list by the first token, then in full."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip_jax.models import blip, families
from blip_jax.tasks import answers
from tests import helpers

MODEL = blip.Blip(helpers.BLIP, answers=True)
SEP = helpers.TOKENS.sep
NUM_QUESTIONS = 3


@pytest.fixture(scope="module")
def params():
  made = helpers.init("vqa", helpers.BLIP, jax.random.key(0))
  return helpers.sharper(made, 4)


@pytest.fixture(scope="module")
def question():
  """States of questions, of which the last one has padding."""
  keys = jax.random.key(1)
  states = jax.random.normal(keys, (NUM_QUESTIONS, 7, helpers.MED.width))
  mask = (np.arange(7) < np.array([[7], [7], [4]])).astype(np.int32)
  return states, jax.device_put(mask)


def make_list(num_answers, longest, seed=0):
  """Answers of 1 to `longest` tokens; several begin with the same one."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, longest + 1, num_answers) + 2
  ids = np.zeros((num_answers, longest + 2), np.int32)
  for row, length in zip(ids, lengths, strict=True):
    row[0], row[length - 1] = helpers.TOKENS.cls, SEP
    row[1] = rng.integers(5, 5 + num_answers // 2)
    row[2 : length - 1] = rng.integers(5, 400, length - 3)
  return ids, lengths.astype(np.int32)


@functools.partial(jax.jit, static_argnums=4)
def rank(params, question, ids, lengths, k):
  return answers.rank(MODEL, params, *question, ids, lengths, k)


@jax.jit
def one_by_one(params, question, ids, mask):
  """Log-probabilities of all tokens [questions, answers, L, V], decoded at
  once: every answer with its own copy of its question."""
  states, question_mask = question
  num_answers = len(ids)
  repeat = lambda x: jnp.repeat(x, num_answers, axis=0)
  tile = lambda x: jnp.tile(x, (len(states), 1))
  apply = functools.partial(MODEL.apply, {"params": params})
  predicted = apply(
    tile(ids),
    tile(mask),
    apply(repeat(states), method="decoder_kv"),
    encoder_mask=repeat(question_mask),
    method="decode",
  )
  logits = predicted.logits()
  return jax.nn.log_softmax(logits).reshape(len(states), num_answers, -1, 424)


def expected(params, question, ids, lengths):
  """First-token probability, NLL and uniform loss of all answers."""
  mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int32)
  log_probs = np.asarray(one_by_one(params, question, ids, mask))[:, :, :-1]
  rows = np.arange(len(ids))[:, None], np.arange(ids.shape[1] - 1)[None]
  token = log_probs[:, *rows, ids[:, 1:]]
  first = np.exp(token[:, :, 0])
  nll = -(token * mask[None, :, 1:]).sum(-1)
  uniform = -(log_probs.mean(-1) * mask[None, :, 1:]).sum(-1)
  return first, nll, uniform


@pytest.mark.parametrize("num_answers, longest, k", [(40, 5, 37), (9, 1, 4)])
def test_answers_are_scored_as_if_each_were_decoded_alone(
  params, question, num_answers, longest, k
):
  """With blocks that are not full, and lengths that differ."""
  ids, lengths = make_list(num_answers, longest)
  first, nll, uniform = expected(params, question, ids, lengths)
  ranked = rank(params, question, ids, lengths, k)
  index = np.asarray(ranked.index)
  assert index.shape == (NUM_QUESTIONS, k)
  for row in range(NUM_QUESTIONS):
    listed = index[row]
    assert len({*listed.tolist()}) == k
    best = np.sort(first[row])[::-1][:k]
    np.testing.assert_allclose(ranked.first_prob[row], best, rtol=1e-4)
    np.testing.assert_allclose(first[row, listed], best, rtol=1e-4)
    np.testing.assert_allclose(ranked.nll[row], nll[row, listed], rtol=1e-4)
    np.testing.assert_allclose(
      ranked.uniform[row], uniform[row, listed], rtol=1e-4
    )
    blip_score = ranked.scores("blip", 0.1)[row]
    np.testing.assert_allclose(
      blip_score,
      -0.9 * nll[row, listed] - 0.1 * uniform[row, listed],
      rtol=1e-4,
    )
    albef_score = ranked.scores("albef", 0.1)[row]
    np.testing.assert_allclose(
      albef_score, np.log(best) - nll[row, listed], rtol=1e-4
    )
    probs = np.exp(-nll[row, listed])
    np.testing.assert_allclose(
      ranked.probs[row], probs / probs.sum(), rtol=1e-3, atol=1e-7
    )


def test_padding_of_questions_is_not_attended_to(params, question):
  ids, lengths = make_list(6, 3)
  states, mask = question
  changed = np.array(states)
  changed[2, 4:] = 9.0
  for one, two in zip(
    rank(params, question, ids, lengths, 6),
    rank(params, (changed, mask), ids, lengths, 6),
    strict=True,
  ):
    np.testing.assert_allclose(one, two, rtol=1e-5)


def test_a_long_list_is_never_decoded_in_full(question):
  """Of 3,000 answers, only the probabilities of their first tokens have the
  size of the list."""
  ids, lengths = make_list(3000, 6)
  shapes = families.abstract("vqa", helpers.BLIP)
  rank_list = functools.partial(answers.rank, MODEL, k=16)
  program = jax.make_jaxpr(rank_list)(
    shapes, *question, jnp.asarray(ids), jnp.asarray(lengths)
  )
  sizes = {3000 * NUM_QUESTIONS, ids.size, len(ids)}
  found = {
    variable.aval.size
    for equation in program.jaxpr.eqns
    for variable in equation.outvars
    if 3000 in variable.aval.shape
  }
  assert found and found <= sizes
