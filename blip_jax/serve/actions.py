"""What the tabs of the demo page do, as functions of plain values.

An image is what was uploaded: encoded bytes, which a model reads as any image.
Tables are lists of rows.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from blip_jax.data import thumbnails
from blip_jax.inference import captioning, search
from blip_jax.inference.explanation import Explanation
from blip_jax.inference.index import Index
from blip_jax.inference.model import Model

Table = list[list[Any]]

CAPTION_COLUMNS = ["no.", "caption", "log-probability"]
WORD_COLUMNS = ["no.", "token", "log-probability", "probability"]
ANSWER_COLUMNS = ["answer", "probability"]
MATCH_COLUMNS = [
  "text",
  "match probability (ITM)",
  "cosine (ITC)",
  "rank score",
]
COMPARE_COLUMNS = ["statement", "true?", "probability that it is true"]

METHODS = ["beam search", "nucleus sampling"]
# What one request may ask for.
MAX_TEXTS = 64
MAX_ANSWERS = 1000
MAX_FOUND = 24
RERANKED = 32
# Side of what is shown, in pixels.
THUMBNAIL = 256


@dataclasses.dataclass(frozen=True)
class Gallery:
  """Images to search, and their embeddings."""

  source: Any
  index: Index


class Actions:
  """What some models can do together: the first one that can does it."""

  def __init__(self, models: Sequence[Model]):
    self._models = models

  def lacks(self, ability: str) -> str | None:
    """Why no model has an ability (`Model.lacks`); None if one has."""
    reasons = [model.lacks(ability) for model in self._models]
    return None if None in reasons else "\n\n".join(map(str, reasons))

  @functools.cache  # noqa: B019  one object lives as long as the process
  def model(self, ability: str) -> Model:
    """The first model with an ability.

    Raises:
      ValueError: none has it; says why.
    """
    for model in self._models:
      if model.lacks(ability) is None:
        return model
    raise ValueError(self.lacks(ability))

  def caption(
    self,
    image: bytes | None,
    method: str,
    num_beams: int,
    min_length: int,
    max_length: int,
    prompt: str,
    num_captions: int,
    top_p: float,
    temperature: float,
    seed: int,
  ) -> tuple[Table, Table, list[Explanation]]:
    """Captions with the log-probabilities and the maps of their words.

    Args:
      image: uploaded.
      method: one of METHODS; beam search by `num_beams`, or sampling by
        `top_p`, `temperature` and `seed`.
      num_beams, min_length, max_length, prompt: as for `Model.caption`; an
        empty prompt stands for the model's own.
      num_captions: how many.
      top_p, temperature, seed: as for `Model.caption`.
    """
    options: dict[str, Any] = dict(
      min_length=int(min_length), max_length=int(max_length)
    )
    if method not in METHODS:
      raise ValueError(f"method: expected one of {METHODS}, found {method!r}")
    if method == METHODS[1]:
      options |= dict(sample=True, top_p=top_p, temperature=temperature)
    else:
      options |= dict(num_beams=max(int(num_beams), int(num_captions)))
    (best,) = self.model("caption").caption(
      _given(image),
      prompt=prompt.strip() or None,
      num_return_sequences=int(num_captions),
      seed=int(seed),
      explain=True,
      **options,
    )
    assert best is not None  # errors are raised
    ranked = [best, *best.others]
    numbered = [*enumerate(ranked, 1)]
    table = [[n, one.text, _rounded(one.log_prob)] for n, one in numbered]
    words = [row for n, one in numbered for row in _tokens(n, one)]
    return table, words, [one.explanation for one in ranked]  # pyright: ignore

  def answer(
    self,
    image: bytes | None,
    question: str,
    answers: str = "",
    num_answers: int = 3,
  ) -> Table:
    """Answers with probabilities, of a list with one on each line, or free."""
    listed, number = _lines(answers, "answers", MAX_ANSWERS), int(num_answers)
    answerer = self.model("answer").answer
    if listed:
      number = min(number, len(listed))
      (best,) = answerer(_given(image), question, listed, num_answers=number)
    else:
      beams = max(3, number)
      (best,) = answerer(_given(image), question, num_beams=beams)
    assert best is not None
    return [[one.text, _rounded(one.prob)] for one in (best, *best.others)][
      :number
    ]

  def match(self, image: bytes | None, texts: str) -> Table:
    """Texts, one on each line, with their scores, the best first."""
    listed = _lines(texts, "texts", MAX_TEXTS)
    if not listed:
      raise ValueError("texts: expected one on each line, found none")
    match = self.model("match").match(_given(image), listed)
    scores = zip(
      listed,
      match.itm_prob[0],
      match.itc_cosine[0],
      match.rank_score[0],
      strict=True,
    )
    rows = [[text, *map(_rounded, numbers)] for text, *numbers in scores]
    return sorted(rows, key=lambda row: -row[-1])

  def explain(self, image: bytes | None, text: str) -> Explanation:
    """What the match of a text with an image rests on."""
    return self.model("match").explain(_given(image), text)

  def compare(
    self, left: bytes | None, right: bytes | None, statements: str
  ) -> Table:
    """Whether statements, one on each line, are true of two images."""
    listed = _lines(statements, "statements", MAX_TEXTS)
    if not listed:
      raise ValueError("statements: expected one on each line, found none")
    pair = _given(left, "the left image"), _given(right, "the right image")
    found = self.model("compare").compare(pair, listed)
    return [
      [text, "yes" if one.label else "no", _rounded(one.prob)]
      for text, one in zip(listed, found, strict=True)
      if one is not None
    ]

  def search(
    self, gallery: Gallery, text: str, image: bytes | None, top: int
  ) -> list[tuple[UInt8[np.ndarray, "h w 3"], str]]:
    """Images of a gallery, by an image if there is one, or by a text."""
    if image is None and not text.strip():
      raise ValueError("Type a text, or upload an image, first.")
    query = text if image is None else image
    found = search.find(
      self.model("embed"),
      gallery.source,
      gallery.index,
      query,
      int(top),
      RERANKED,
    )
    shown = []
    for result in found:
      thumbnail = thumbnails.read(
        lambda row=result["row"]: gallery.source[row]["image"],
        THUMBNAIL,
        result["id"],
      )
      scores = f"cos {result['cosine']:.2f}"
      if "itm_prob" in result:
        scores = f"{result['itm_prob']:.0%}, {scores}"  # short: it is cut
      if thumbnail is not None:
        shown.append((thumbnail, scores))
    return shown


def overlay(
  explanation: Explanation, word: int | None, image: bytes | None
) -> UInt8[np.ndarray, "h w 3"]:
  """The image with the map of the word of a number, or of the whole text."""
  if word is None:
    return explanation.overlay(None, image)
  one = dataclasses.replace(explanation, whole=explanation.maps[word])
  return one.overlay(None, image)


def _tokens(number: int, caption: captioning.Caption) -> Table:
  return [
    [number, token, _rounded(log_prob), _rounded(float(np.exp(log_prob)))]
    for token, log_prob in zip(
      caption.tokens, caption.token_log_probs, strict=True
    )
  ]


def _given(image: bytes | None, what: str = "an image") -> bytes:
  if image is None:
    raise ValueError(f"Upload {what} first, or click on an example.")
  return image


def _lines(text: str, what: str, most: int) -> list[str]:
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  if len(lines) > most:
    raise ValueError(
      f"{what}: expected at most {most} lines, found {len(lines)}"
    )
  return lines


def _rounded(number: Any) -> float:
  return round(float(number), 4)
