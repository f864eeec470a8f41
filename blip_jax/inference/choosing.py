"""Candidate answers to the question of a dialog, ranked with probabilities.

Dimensions: I dialogs at a time, G groups of C candidates, L text length.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Int32, UInt8

from blip_jax.data import dialog_examples, dialogs, rejects
from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.inference import images as images_lib
from blip_jax.inference import matching
from blip_jax.inference import texts as texts_lib
from blip_jax.models import blip, med
from blip_jax.runtime import sharding
from blip_jax.tasks import base
from blip_jax.tasks import dialog as dialog_task

# Limits of a text, as in training.
MAX_WORDS = 30
CONTEXT_TOKENS = 40
MAX_TOKENS = 192
# Candidates of each dialog that are scored at once, at most.
CANDIDATES_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Dialog:
  """A question about an image, what was said before, and possible answers.

  Attributes:
    image: a path, encoded bytes, a uint8 array [H, W, 3], or a PIL image.
    question: the question to answer.
    candidates: possible answers, any number.
    history: earlier questions, each with its answer, the oldest first.
    caption: what the dialog starts from; "" if there is none.
  """

  image: images_lib.Image
  question: str
  candidates: Sequence[str]
  history: Sequence[tuple[str, str]] = ()
  caption: str = ""


@dataclasses.dataclass(frozen=True, repr=False)
class Choice:
  """A candidate answer, with its probability.

  Attributes:
    text: the candidate.
    prob: the probability that it is right, from 0 to 1. Each candidate has its
      own: they need not sum to 1.
    index: its number among the candidates, from 0 on.
    others: the other candidates, best first.
  """

  text: str
  prob: float
  index: int
  others: tuple["Choice", ...] = ()

  def __repr__(self) -> str:
    others = f", {len(self.others)} others" if self.others else ""
    return f"Choice({self.text!r}, prob={self.prob:.3f}{others})"


class DialogReader(images_lib.ImageReader):
  """Reads the image of a dialog; see `images.ImageReader`."""

  what: ClassVar[str] = "dialog"
  takes_videos: ClassVar[bool] = False

  def __call__(self, image: object) -> UInt8[np.ndarray, "..."]:
    assert isinstance(image, Dialog)
    try:
      return super().__call__(image.image)
    except rejects.BadSample as error:
      path = image.image if isinstance(image.image, str | os.PathLike) else ""
      if not path or os.fspath(path) in str(error):
        raise
      detail = f"{os.fspath(path)}: {error.detail}"
      raise rejects.BadSample(error.reason, detail) from error


def checked(given: Dialog | Iterable[Dialog]) -> Iterable[Dialog]:
  """Yields dialogs.

  Raises:
    ValueError: at the first that is none, or has a value of another type.
  """
  given = [given] if isinstance(given, Dialog) else given
  for number, dialog in enumerate(given):
    where = f"choose: dialog {number}"
    if not isinstance(dialog, Dialog):
      raise ValueError(
        f"{where}: expected a blip_jax.Dialog, found {dialog!r:.200}"
      )
    candidates, history = dialog.candidates, dialog.history
    if not _is_list(candidates) or not len(candidates):
      raise ValueError(
        f"{where}: candidates: expected a list of texts, found "
        f"{candidates!r:.200}"
      )
    if not _is_list(history) or not all(
      _is_list(pair) and len(pair) == 2 for pair in history
    ):
      raise ValueError(
        f"{where}: history: expected pairs of a question and an answer, found "
        f"{history!r:.200}"
      )
    said = [text for pair in history for text in pair]
    for text in (dialog.caption, dialog.question, *said, *candidates):
      if not isinstance(text, str):
        raise ValueError(f"{where}: expected texts, found {text!r:.200}")
    if not dialog.question.strip():
      raise ValueError(f"{where}: expected a question, found none")
    yield dialog


def _is_list(value: object) -> bool:
  is_sequence = isinstance(value, Sequence | np.ndarray)
  return is_sequence and not isinstance(value, str | bytes)


class Chooser:
  """Chooses answers in batches of dialogs; see `inference.model.Model.chooser`.

  Texts are padded to a multiple of `inference.texts.TOKENS`, and candidates to
  a power of two or a multiple of `CANDIDATES_AT_ONCE`, so that few programs
  serve all.
  """

  def __init__(
    self,
    module: blip.Blip,
    params: med.Params,
    tokenizer: tokenizer_lib.Tokenizer | None,
    mesh: jax.sharding.Mesh,
  ):
    tokenizer = texts_lib.vocabulary(tokenizer, "read dialogs")
    dialog_task.check_widths(module.config)
    self._module, self._params, self._mesh = module, params, mesh
    positions = module.config.med.max_positions
    self._texts = dialog_examples.DialogTexts(
      tokenizer,
      MAX_WORDS,
      min(CONTEXT_TOKENS, positions),
      min(MAX_TOKENS, positions),
    )

  def __call__(
    self, pixels: UInt8[np.ndarray, "I H W 3"], given: Sequence[Dialog]
  ) -> list[Choice]:
    """Chooses the answer in each dialog.

    Args:
      pixels: of their images.
      given: the dialogs.

    Raises:
      ValueError: a text is not UTF-8, or a candidate is too long.
    """
    batch = {"image": pixels, **self._arrays(given)}
    with sharding.activate(self._mesh):
      batch = sharding.put_batch(batch, self._mesh)
      scores = _scores(self._module, self._params, batch)
    scores = matching.refuse_nan(sharding.local_rows(scores))
    return [
      _choice(dialog, row.reshape(-1)[: len(dialog.candidates)])
      for dialog, row in zip(given, scores, strict=True)
    ]

  def _arrays(self, given: Sequence[Dialog]) -> dict[str, np.ndarray]:
    contexts, written = zip(*map(self._tokens, given), strict=True)
    most = max(len(ids) for ids, _ in written)
    width = min(1 << (most - 1).bit_length(), CANDIDATES_AT_ONCE)
    longest = max(int(mask.sum(axis=1).max()) for _, mask in written)
    length = texts_lib.padded_length(longest, self._texts.max_length)
    padded = -(-most // width) * width

    def grouped(x: Int32[np.ndarray, "_ _"]) -> Int32[np.ndarray, "G C L"]:
      x = np.pad(x[:, :length], ((0, padded - len(x)), (0, 0)))
      return x.reshape(-1, width, length)

    return {
      "context_ids": np.stack([ids for ids, _ in contexts]),
      "context_mask": np.stack([mask for _, mask in contexts]),
      "input_ids": np.stack([grouped(ids) for ids, _ in written]),
      "attention_mask": np.stack([grouped(mask) for _, mask in written]),
    }

  def _tokens(self, dialog: Dialog) -> tuple[Any, Any]:
    said = [dialogs.Round(*pair) for pair in dialog.history]
    asked = dialogs.Round(dialog.question, candidates=(*dialog.candidates,))
    picked = [(len(said), range(len(asked.candidates)))]
    try:
      context = self._texts.context(dialog.caption)
      (written,) = self._texts.rounds([*said, asked], picked)
    except rejects.BadSample as error:
      raise ValueError(f"question {dialog.question!r:.200}: {error}") from error
    return context, written


def results(
  batches: Generator[images_lib.Batch, None, None],
  following: Iterator[Dialog],
  choose: Chooser,
) -> Iterator[Choice | None]:
  """Yields the choice in each dialog, None if its image was skipped.

  Args:
    batches: images of the dialogs.
    following: the dialogs, in the same order.
    choose: called once a batch.
  """
  with contextlib.closing(batches):
    for pixels, errors in batches:
      given = [*itertools.islice(following, len(errors))]
      filling = given[-1:] * (len(pixels) - len(given))
      chosen = choose(pixels, [*given, *filling])
      for error, one in zip(errors, chosen, strict=False):
        yield one if error is None else None


def _choice(dialog: Dialog, scores: np.ndarray) -> Choice:
  probs = np.exp(-np.logaddexp(0, -scores.astype(np.float64)))
  texts = [*dialog.candidates]
  best, *others = [
    Choice(texts[n], float(probs[n]), n)
    for n in np.argsort(-scores, kind="stable").tolist()
  ]
  return dataclasses.replace(best, others=tuple(others))


@functools.partial(jax.jit, static_argnums=0)
def _scores(module: blip.Blip, params: med.Params, batch: base.Batch):
  return dialog_task.score(module, params, batch)
