"""From the record of a question to the arrays of a batch.

Dimensions: F frames, H and W image, Lq question length, m questions about an
image, A answers of a question, La answer length. Images are uint8 RGB; tokens
are int32.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from blip_jax.data import (
  datasets,
  examples,
  questions,
  sources,
  tokenizer,
  transforms,
)

log = logging.getLogger(__name__)

_TOKENS = ("question_ids", "question_mask")


@dataclasses.dataclass(frozen=True)
class QuestionExample(examples.Stacked):
  """`image` [H, W, 3], `question_ids` and `question_mask` [Lq].

  The image is [F, H, W, 3] for videos.

  Attributes:
    tokenizer: of the model.
    image: resizes a decoded image for the model.
    max_words: questions are truncated to this number of words before they are
      tokenised.
    max_length: length of a question in tokens, Lq; special tokens and padding
      included.
    max_pixels: stored images with more pixels are bad samples.
    num_frames: F, frames to take of each video; 0 if records have images.
  """

  tokenizer: tokenizer.Tokenizer
  image: examples.ImageTransform
  max_words: int = 50
  max_length: int = 35
  max_pixels: int = transforms.MAX_PIXELS
  num_frames: int = 0

  open_source = staticmethod(datasets.open_questions)

  def __call__(
    self, record: sources.Record, rng: np.random.Generator
  ) -> examples.Arrays:
    ids, mask = self.tokens([record])
    image = examples.pixels(
      record["image"], self.image, self.max_pixels, rng, self.num_frames
    )
    return {
      "image": image,
      "question_ids": ids[0],
      "question_mask": mask[0],
    }

  def tokens(
    self, records: Sequence[sources.Record]
  ) -> tuple[Int32[np.ndarray, "m Lq"], Int32[np.ndarray, "m Lq"]]:
    """Returns ids and mask of the questions of records."""
    cleaned = [
      questions.cleaned(r["question"], self.max_words) for r in records
    ]
    return self.tokenizer.encode(cleaned, self.max_length)

  def blank(self) -> examples.Arrays:
    zeros = np.zeros(self.max_length, np.int32)
    return {
      "image": examples.black(self.image, self.num_frames),
      "question_ids": zeros,
      "question_mask": zeros,
    }


@dataclasses.dataclass(frozen=True)
class GroupExample(examples.Stacked):
  """A record of `question_groups.Groups`: an image, and questions about it.

  `image` is that of `QuestionExample`; `question_ids` and `question_mask` are
  [m, Lq], with zeros where there are fewer questions.

  Attributes:
    question: makes the example of a question.
    size: m.
  """

  question: QuestionExample
  size: int

  def __call__(
    self, record: sources.Record, rng: np.random.Generator
  ) -> examples.Arrays:
    first, asked = self.question(record, rng), record["asked"]
    example = {**self.blank(), "image": first["image"]}
    for name, tokens in zip(_TOKENS, self.question.tokens(asked), strict=True):
      example[name][: len(asked)] = tokens
    return example

  def blank(self) -> examples.Arrays:
    blank = self.question.blank()
    repeated = {name: np.stack([blank[name]] * self.size) for name in _TOKENS}
    return blank | repeated


@dataclasses.dataclass(frozen=True)
class AnsweredExample(examples.Stacked):
  """A question with its weighted answers, for training.

  In addition to those of `QuestionExample`: `answer_ids` and `answer_mask`
  [A, La], and `answer_weight` [A], which is 0 for padding. Every question has
  the same number of places for answers, so that shapes are static and the
  answers of a question stay on its device.

  Attributes:
    question: makes the example of the question.
    max_answers: A; of more distinct answers, those of the least weight are
      dropped.
    max_length: La; longer answers are dropped, since the beginning of an answer
      is another answer.
  """

  question: QuestionExample
  max_answers: int
  max_length: int

  open_source = staticmethod(datasets.open_questions)

  def __call__(
    self, record: sources.Record, rng: np.random.Generator
  ) -> examples.Arrays:
    weights = questions.weighted(record)
    likeliest = sorted(weights, key=lambda answer: -weights[answer])
    if not likeliest:
      raise transforms.BadSample("no_answer", repr(record["question"][:60]))
    # One token more shows which answers are too long.
    ids, mask = self.question.tokenizer.encode(likeliest, self.max_length + 1)
    fits = np.flatnonzero(mask[:, -1] == 0)[: self.max_answers]
    if not len(fits):
      detail = (
        f"{likeliest[0][:60]!r}: expected at most {self.max_length} tokens "
        "(config.vqa.max_answer_length)"
      )
      raise transforms.BadSample("answer_too_long", detail)
    example = self.question(record, rng) | self._no_answers()
    place = slice(0, len(fits))
    example["answer_ids"][place] = ids[fits, : self.max_length]
    example["answer_mask"][place] = mask[fits, : self.max_length]
    example["answer_weight"][place] = [weights[likeliest[n]] for n in fits]
    return example

  def blank(self) -> examples.Arrays:
    return self.question.blank() | self._no_answers()

  def _no_answers(self) -> dict[str, Any]:
    shape = self.max_answers, self.max_length
    return {
      "answer_ids": np.zeros(shape, np.int32),
      "answer_mask": np.zeros(shape, np.int32),
      "answer_weight": np.zeros(self.max_answers, np.float32),
    }


def answer_tokens(
  text_tokenizer: tokenizer.Tokenizer, answers: Sequence[str], max_length: int
) -> tuple[list[str], Int32[np.ndarray, "M L"], Int32[np.ndarray, " M"]]:
  """Returns a list of answers, their ids, and their numbers of tokens.

  Answers that are the same to a model ("yes" and "Yes") would share their
  probability. The first of them counts, and the others are reported.

  Args:
    answers: as wide as the longest one, L, special tokens included.
    max_length: positions of the model.

  Raises:
    ValueError: an answer has more tokens than positions, or none.
  """
  ids, mask = text_tokenizer.encode(answers, max_length + 1)
  lengths = mask.sum(axis=1, dtype=np.int32)
  for row in np.flatnonzero((lengths > max_length) | (lengths < 3))[:1]:
    raise ValueError(
      f"answer {answers[row]!r:.200}: expected 1 to {max_length - 2} tokens, "
      f"found {lengths[row] - 2} or more"
    )
  ids = ids[:, : lengths.max()]
  numbers: dict[bytes, int] = {}
  first = [numbers.setdefault(row.tobytes(), n) for n, row in enumerate(ids)]
  if again := [n for n, earlier in enumerate(first) if n != earlier]:
    log.warning(
      "%d of %d answers have the tokens of an earlier one, and count with it: "
      "%.60r has those of %.60r",
      *(len(again), len(answers)),
      *(answers[again[0]], answers[first[again[0]]]),
    )
  kept = [*numbers.values()]
  return [answers[n] for n in kept], ids[kept], lengths[kept]
