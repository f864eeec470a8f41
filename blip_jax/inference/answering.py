"""Answers to questions about images, with their probabilities."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import spmd
from jaxtyping import Int32, UInt8

from blip_jax.data import question_examples, questions
from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.inference import matching
from blip_jax.inference import texts as texts_lib
from blip_jax.models import card as card_lib
from blip_jax.models import decoding, med
from blip_jax.runtime import sharding
from blip_jax.tasks import answers as answers_lib
from blip_jax.tasks import vqa

# As in training.
MAX_WORDS = 50
MAX_TOKENS = 35
LABEL_SMOOTHING = 0.1
NAMES = texts_lib.Names("answer", "image", "question")


@dataclasses.dataclass(frozen=True, repr=False)
class Answer:
  """An answer to a question about an image, with its probability.

  Attributes:
    text: the answer; "" if the model abstains.
    prob: its probability, from 0 to 1: among the answers of the list that were
      scored, or among all texts if there is no list.
    log_prob: natural logarithm of its probability among all texts, given image
      and question. It includes [SEP], unless a generated answer stopped at the
      length limit.
    score: what the answers to a question are ranked by, the higher the better.
    abstains: whether the best answer, which is the first of `others`, is less
      probable than `abstain_below`.
    others: further answers to the same question, best first.
  """

  text: str
  prob: float
  log_prob: float
  score: float
  abstains: bool = False
  others: tuple["Answer", ...] = ()

  def __repr__(self) -> str:
    what = "abstains" if self.abstains else repr(self.text)
    others = f", {len(self.others)} others" if self.others else ""
    return f"Answer({what}, prob={self.prob:.3f}{others})"


class _Found(NamedTuple):
  """The best answers to each question.

  Attributes:
    answer: numbers in the list [B, m], or ids of tokens [B, m, L].
    prob, log_prob, score: [B, m].
  """

  answer: Any
  prob: Any
  log_prob: Any
  score: Any


class _Listed(NamedTuple):
  """How a list of answers is ranked; the parts that decide a program."""

  k: int
  rank_score: str
  num_answers: int


class _Generated(NamedTuple):
  """How answers are generated; the parts that decide a program."""

  num_positions: int
  legacy_mask: bool


class Answerer:
  """Answers batches of questions; see `inference.model.Model.answerer`."""

  def __init__(
    self,
    card: card_lib.Card,
    module: nn.Module,
    params: med.Params,
    tokenizer: tokenizer_lib.Tokenizer | None,
    mesh: jax.sharding.Mesh,
    answers: Sequence[str] | str | os.PathLike | None = None,
    *,
    num_answers: int | None = None,
    k_test: int = 128,
    rank_score: str = "blip",
    abstain_below: float = 0.0,
    legacy_cls: bool = False,
    legacy_mask: bool = False,
    num_positions: int = 0,
    **options: Any,
  ):
    tokenizer = texts_lib.vocabulary(tokenizer, "read questions")
    if rank_score not in answers_lib.SCORES:
      raise ValueError(
        f"rank_score: expected one of {answers_lib.SCORES}, found "
        f"{rank_score!r}"
      )
    if not 0 <= abstain_below <= 1:
      raise ValueError(
        f"abstain_below: expected a probability, found {abstain_below}"
      )
    for name, value in (("k_test", k_test), ("num_answers", num_answers)):
      if value is not None:
        decoding.at_least(name, value, 1)
    self._module, self._params, self._mesh = module, params, mesh
    self._tokenizer = tokenizer
    self._abstain_below = abstain_below
    self._legacy_cls, self._legacy_mask = legacy_cls, legacy_mask
    positions = card.config.med.max_positions
    self.max_words, self.max_tokens = MAX_WORDS, min(MAX_TOKENS, positions)
    self._answers: list[str] = []
    if answers is not None:
      if options:
        raise ValueError(
          f"{sorted(options)}: options of generation; answers of a list are "
          "ranked. Leave them out, or answers="
        )
      listed = (
        questions.read_answer_list(answers)
        if isinstance(answers, str | os.PathLike)
        else questions.answer_list(answers, "answers")
      )
      self._answers, *tokens = question_examples.answer_tokens(
        tokenizer, listed, positions
      )
      self._inputs: Any = tokens
      k = min(k_test, len(self._answers))
      self._how: Any = _Listed(k, rank_score, min(num_answers or 5, k))
    else:
      if num_answers is not None:
        options["num_return_sequences"] = num_answers
      settings = answers_lib.settings(card.generation, positions, **options)
      if "num_return_sequences" not in options:
        settings = dataclasses.replace(
          settings, num_return_sequences=settings.num_beams
        )
      self._inputs = settings
      num_positions = decoding.num_positions_for(
        max(int(settings.max_length), num_positions), positions
      )
      self._how = _Generated(num_positions, legacy_mask)

  def tokens(
    self, texts: Sequence[str]
  ) -> tuple[Int32[np.ndarray, "I L"], Int32[np.ndarray, "I L"], list[str]]:
    """Returns ids and mask of questions, and those that were cut.

    Raises:
      ValueError: one has no words, or is not UTF-8.
    """
    cleaned = [clean(text) for text in texts]
    ids, mask, is_cut = texts_lib.encode(
      self._tokenizer, cleaned, self.max_tokens
    )
    longest = int(mask.sum(axis=1).max())
    if not self._legacy_mask:  # which sees the padding, so none is added
      longest = texts_lib.padded_length(longest, self.max_tokens)
    cut = [text for text, long in zip(texts, is_cut, strict=True) if long]
    return ids[:, :longest], mask[:, :longest], cut

  def __call__(
    self,
    pixels: UInt8[np.ndarray, "I *F H W 3"],
    question_ids: Int32[np.ndarray, "B L"],
    question_mask: Int32[np.ndarray, "B L"],
  ) -> list[Answer]:
    """Answers B / I questions about each image, or video of F frames.

    Args:
      pixels: of the images.
      question_ids: of the questions, those about one image together.
      question_mask: 1 on their tokens.
    """
    batch = {
      "pixels": pixels,
      "question_ids": question_ids,
      "question_mask": question_mask,
    }
    with sharding.activate(self._mesh):
      found = _answer(
        (self._module, self._how, self._legacy_cls),
        self._params,
        sharding.put_batch(batch, self._mesh),
        self._inputs,
      )
    found = jax.tree.map(sharding.local_rows, found)
    matching.refuse_nan(found.log_prob)
    return [self._one(_Found(*row)) for row in zip(*found, strict=True)]

  def _one(self, found: _Found) -> Answer:
    """The best answer to one question, with the others."""
    texts = (
      [self._answers[n] for n in found.answer.tolist()]
      if self._answers
      else self._tokenizer.decode(found.answer)
    )
    numbers = found.prob.tolist(), found.log_prob.tolist(), found.score.tolist()
    best, *others = [
      Answer(*values) for values in zip(texts, *numbers, strict=True)
    ]
    if best.prob < self._abstain_below:
      none = dataclasses.replace(best, text="", abstains=True)
      return dataclasses.replace(none, others=(best, *others))
    return dataclasses.replace(best, others=tuple(others))


@functools.partial(jax.jit, static_argnums=0)
def _answer(how, params, batch, inputs) -> _Found:
  module, how, legacy_cls = how
  question = batch["question_ids"], batch["question_mask"]
  states = vqa.read(
    module, params, batch["pixels"], *question, legacy_cls=legacy_cls
  )
  find = _rank if isinstance(how, _Listed) else _generate
  found = find(module, params, states, question[1], inputs, how)
  return jax.tree.map(
    lambda x: spmd.with_logical_constraint(
      x, ("batch", *[None] * (x.ndim - 1))
    ),
    found,
  )


def _rank(module, params, states, mask, listed, how: _Listed) -> _Found:
  ids, lengths = map(jnp.asarray, listed)
  ranked = answers_lib.rank(module, params, states, mask, ids, lengths, how.k)
  score = ranked.scores(how.rank_score, LABEL_SMOOTHING)
  score, best = jax.lax.top_k(score, how.num_answers)
  pick = lambda x: jnp.take_along_axis(x, best, axis=1)
  return _Found(
    pick(ranked.index), pick(ranked.probs), -pick(ranked.nll), score
  )


def _generate(module, params, states, mask, settings, how) -> _Found:
  generated = answers_lib.generate(
    module, params, states, mask, settings, how.num_positions, how.legacy_mask
  )
  log_prob = generated.token_log_probs.sum(axis=-1)
  return _Found(generated.ids, jnp.exp(log_prob), log_prob, generated.scores)


def clean(question: str) -> str:
  """Returns a question as models read it; `ValueError` if it is none."""
  return texts_lib.cleaned(questions.cleaned, question, MAX_WORDS, NAMES)
