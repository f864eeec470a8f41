"""From the record of a dialog to the arrays of a batch.

Dimensions: H and W image, Lc length of the context, R rounds, C candidates of a
round, L length of a text. Images are uint8 RGB; tokens are int32.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from blip_jax.data import (
  datasets,
  dialogs,
  examples,
  sources,
  tokenizer,
  transforms,
)

# A text as ids and mask.
Tokens = tuple[Int32[np.ndarray, "..."], Int32[np.ndarray, "..."]]
# Some of the candidates of a round: its number, and theirs.
Picked = tuple[int, Sequence[int]]


@dataclasses.dataclass(frozen=True)
class DialogTexts:
  """Writes dialogs as tokens.

  A text is [CLS], the history, the question and a candidate, with [SEP] after
  each question and each answer. If it is too long, the oldest rounds of the
  history are left out, the same ones for all candidates of a round, and then
  the question is cut, but a candidate never is.

  Attributes:
    tokenizer: of the model.
    max_words: contexts are truncated to this number of words before they are
      tokenised.
    context_length: length of a context in tokens, Lc; special tokens and
      padding included.
    max_length: length of a text in tokens, L, likewise.
  """

  tokenizer: tokenizer.Tokenizer
  max_words: int = 30
  context_length: int = 40
  max_length: int = 192

  def context(self, caption: str) -> Tokens:
    """Ids and mask [Lc] of a caption; without one, there is only padding.

    Raises:
      BadSample: it is not UTF-8, is too long, or has no words.
    """
    if not caption:
      zeros = np.zeros(self.context_length, np.int32)
      return zeros, zeros
    text = transforms.clean_text(caption)
    text = transforms.pre_caption(text, self.max_words)
    ids, mask = self.tokenizer.encode([text], self.context_length)
    return ids[0], mask[0]

  def rounds(
    self, dialog: Sequence[dialogs.Round], picked: Sequence[Picked]
  ) -> list[Tokens]:
    """Ids and mask [c, L] of the c picked candidates of some rounds.

    Raises:
      BadSample: a candidate is too long, or a text is not UTF-8.
    """
    last = max(number for number, _ in picked)
    texts = [
      text
      for each in dialog[: last + 1]
      for text in (each.question, each.answer)
    ]
    num_said = len(texts)
    texts += [
      dialog[number].candidates[n] for number, chosen in picked for n in chosen
    ]
    tokens = self._tokens(texts)
    said, rest = tokens[:num_said], iter(tokens[num_said:])
    # Rounds without an answer say nothing that a later one could refer to.
    history = [
      np.concatenate(said[2 * n : 2 * n + 2]) if each.answer else said[2 * n]
      for n, each in enumerate(dialog[:last])
    ]
    return [
      self._joined(
        history[:number], said[2 * number], [next(rest) for _ in chosen]
      )
      for number, chosen in picked
    ]

  def _tokens(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
    """Tokens of each text, [SEP] at the end."""
    cleaned = [_cleaned(text, self.max_length) for text in texts]
    # One token more shows which texts are too long.
    ids, mask = self.tokenizer.encode(cleaned, self.max_length + 1)
    ends = mask.sum(axis=1)
    return [row[1:end] for row, end in zip(ids, ends, strict=True)]

  def _joined(
    self,
    history: Sequence[Int32[np.ndarray, "_"]],
    question: Int32[np.ndarray, "_"],
    candidates: Sequence[Int32[np.ndarray, "_"]],
  ) -> Tokens:
    longest = max(map(len, candidates))
    room = self.max_length - 1 - longest
    if room < 0:
      detail = (
        f"a candidate has {longest + 1} or more tokens: expected at most "
        f"{self.max_length} (config.data.max_length)"
      )
      raise transforms.BadSample("answer_too_long", detail)
    question = question[:room]
    room -= len(question)
    kept = len(history)
    while kept and len(history[kept - 1]) <= room:
      kept -= 1
      room -= len(history[kept])
    first = np.array([self.tokenizer.cls_id], np.int32)
    prefix = np.concatenate([first, *history[kept:], question])
    ids = np.full(
      (len(candidates), self.max_length), self.tokenizer.pad_id, np.int32
    )
    mask = np.zeros_like(ids)
    ids[:, : len(prefix)] = prefix
    for row, row_mask, candidate in zip(ids, mask, candidates, strict=True):
      end = len(prefix) + len(candidate)
      row[len(prefix) : end] = candidate
      row_mask[:end] = 1
    return ids, mask


@dataclasses.dataclass(frozen=True)
class DialogExample(examples.Stacked):
  """An image, its context, and rounds of the dialog, each with candidates.

  `image` [H, W, 3]; `context_ids` and `context_mask` [Lc]; `input_ids` and
  `attention_mask` [R, C, L], as `DialogTexts` writes them, where the mask of
  padding is 0; `label` [R, C], 1 for the right candidate.

  Attributes:
    texts: writes them.
    image: resizes a decoded image for the model.
    rounds: R.
    candidates: C.
    sampled: whether R rounds are sampled, with the right candidate, which comes
      first, and C - 1 of the wrong ones. Otherwise all rounds that have
      candidates are there, in order, with all of them; see `most`.
    max_pixels: stored images with more pixels are bad samples.
  """

  texts: DialogTexts
  image: examples.ImageTransform
  rounds: int
  candidates: int
  sampled: bool = False
  max_pixels: int = transforms.MAX_PIXELS

  open_source = staticmethod(datasets.open_dialogs)

  def __call__(
    self, record: sources.Record, rng: np.random.Generator
  ) -> examples.Arrays:
    dialog = record["dialog"]
    if self.sampled:
      picked = self._sampled(dialog, rng)
    else:
      picked = [(n, range(len(dialog[n].candidates))) for n in asked(dialog)]
      self._check_size(dialog)
    example = self.blank()
    written = self.texts.rounds(dialog, picked)
    for row, (ids, mask) in enumerate(written):
      number, chosen = picked[row]
      place = row, slice(0, len(chosen))
      example["input_ids"][place] = ids
      example["attention_mask"][place] = mask
      example["label"][place] = np.equal(chosen, dialog[number].right)
    example["context_ids"], example["context_mask"] = self.texts.context(
      record["context"]
    )
    example["image"] = examples.pixels(
      record["image"], self.image, self.max_pixels, rng
    )
    return example

  def blank(self) -> examples.Arrays:
    texts = self.rounds, self.candidates, self.texts.max_length
    context = self.texts.context_length
    shapes = {
      "context_ids": context,
      "context_mask": context,
      "input_ids": texts,
      "attention_mask": texts,
      "label": texts[:-1],
    }
    arrays = {name: np.zeros(x, np.int32) for name, x in shapes.items()}
    return {"image": examples.black(self.image), **arrays}

  def _check_size(self, dialog: Sequence[dialogs.Round]) -> None:
    rounds, candidates = _size(dialog)
    if rounds > self.rounds or candidates > self.candidates:
      raise transforms.BadSample(
        "dialog_too_large",
        f"expected at most {self.rounds} rounds with at most "
        f"{self.candidates} candidates, found {rounds} and {candidates}; see "
        "config.dialog.max_rounds and config.dialog.max_candidates",
      )

  def _sampled(
    self, dialog: Sequence[dialogs.Round], rng: np.random.Generator
  ) -> list[Picked]:
    usable = [
      number
      for number, each in enumerate(dialog)
      if each.right is not None and len(each.candidates) > 1
    ]
    if not usable:
      detail = "no round has a right and a wrong candidate"
      raise transforms.BadSample("no_candidates", detail)
    picked = []
    for number in _choose(usable, self.rounds, rng):
      each = dialog[number]
      wrong = [n for n in range(len(each.candidates)) if n != each.right]
      wrong = _choose(wrong, self.candidates - 1, rng)
      picked.append((number, [each.right, *wrong]))
    return picked


def asked(dialog: Sequence[dialogs.Round]) -> list[int]:
  """Returns the numbers of the rounds that have candidates."""
  return [number for number, each in enumerate(dialog) if each.candidates]


def most(source: Any, max_rounds: int, max_candidates: int) -> tuple[int, int]:
  """Returns how many rounds with candidates a dialog has at most, and how many
  candidates a round; at least 1.

  Args:
    source: of dialogs, all of which are read, without their images.
    max_rounds: dialogs with more rounds that have candidates do not count.
    max_candidates: nor do those with a round that has more candidates.
  """
  largest = 1, 1
  for index in range(len(source)):
    try:
      dialog = source[index]["dialog"]
    except sources.BadRow:
      continue  # which is counted when its image is read
    rounds, candidates = _size(dialog)
    if rounds <= max_rounds and candidates <= max_candidates:
      largest = max(largest[0], rounds), max(largest[1], candidates)
  return largest


def _size(dialog: Sequence[dialogs.Round]) -> tuple[int, int]:
  """The number of rounds with candidates, and the most candidates of one."""
  sizes = [len(each.candidates) for each in dialog if each.candidates]
  return len(sizes), max(sizes, default=0)


def _choose(
  values: Sequence[int], number: int, rng: np.random.Generator
) -> list[int]:
  """Samples so many of the values, or all if there are fewer."""
  size = min(number, len(values))
  return rng.choice(values, size, replace=False).tolist()


def _cleaned(text: str, max_words: int) -> str:
  """A question or an answer as a model reads it.

  Other than a question for VQA, it may be "..." or nothing, since an answer
  may.
  """
  try:
    text = transforms.clean_text(text)
  except transforms.BadSample as error:
    if error.reason != "empty_caption":
      raise
    return text
  return transforms.pre_question(text, max_words)
