"""Whether statements about pairs of images are true, with probabilities."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from flax.linen import spmd
from jaxtyping import Int32, UInt8

from blip_jax.data import rejects, statements
from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.inference import images as images_lib
from blip_jax.inference import matching, texts
from blip_jax.models import med, nlvr
from blip_jax.runtime import sharding
from blip_jax.tasks import nlvr as nlvr_task

# As in training.
MAX_WORDS = 40
NAMES = texts.Names("compare", "pair", "statement")

# Two images, the left one first.
Pair = Sequence[images_lib.Image] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Whether a statement about two images is true.

  Attributes:
    label: whether it is rather true than false.
    prob: the probability that it is true, from 0 to 1.
  """

  label: bool
  prob: float


class PairReader(images_lib.ImageReader):
  """Reads two images as pixels [2, H, W, 3]; see `images.ImageReader`."""

  what: ClassVar[str] = "pair"
  takes_videos: ClassVar[bool] = False

  def __call__(self, image: object) -> UInt8[np.ndarray, "..."]:
    if not isinstance(image, (tuple, list, np.ndarray)) or len(image) != 2:
      detail = f"expected two images, found {image!r:.200}"
      raise rejects.BadSample("not_a_pair", detail)
    return np.stack([self._one(number) for number in enumerate(image)])

  def _one(self, numbered: tuple[int, object]) -> UInt8[np.ndarray, "H W 3"]:
    try:
      return super().__call__(numbered[1])
    except rejects.BadSample as error:
      detail = images_lib.where("image", *numbered, error)
      raise rejects.BadSample(error.reason, detail) from error

  def black(self) -> UInt8[np.ndarray, "..."]:
    return np.stack([super().black()] * 2)


def as_pairs(pairs: Pair | Iterable[Pair]) -> Iterable[Any]:
  """A single pair as a list of one; anything else as it is."""
  if isinstance(pairs, np.ndarray):
    return [pairs] if pairs.ndim == 4 else pairs
  is_pair = isinstance(pairs, (tuple, list)) and len(pairs) == 2
  if is_pair and all(_is_image(image) for image in pairs):
    return [pairs]
  return pairs


def _is_image(image: object) -> bool:
  is_stack = isinstance(image, np.ndarray) and image.ndim > 3
  return isinstance(image, images_lib.Image) and not is_stack


class Comparer:
  """Compares batches of pairs; see `inference.model.Model.comparer`."""

  def __init__(
    self,
    module: nlvr.Nlvr,
    params: med.Params,
    tokenizer: tokenizer_lib.Tokenizer | None,
    mesh: jax.sharding.Mesh,
  ):
    self._module, self._params, self._mesh = module, params, mesh
    self._tokenizer = texts.vocabulary(tokenizer, "read statements")
    self.max_words = MAX_WORDS
    self.max_tokens = module.config.med.max_positions

  def tokens(
    self, given: Sequence[str]
  ) -> tuple[Int32[np.ndarray, "I L"], Int32[np.ndarray, "I L"], list[str]]:
    """Returns ids and mask of statements, and those that were cut.

    Raises:
      ValueError: one has no words, or is not UTF-8.
    """
    every_word = [_cleaned(text, len(text)) for text in given]
    cleaned = [_cleaned(text, MAX_WORDS) for text in given]
    ids, mask, is_cut = texts.encode(self._tokenizer, cleaned, self.max_tokens)
    length = texts.padded_length(int(mask.sum(axis=1).max()), self.max_tokens)
    cut = [
      text
      for text, whole, kept, is_long in zip(
        given, every_word, cleaned, is_cut, strict=True
      )
      if is_long or whole != kept
    ]
    return ids[:, :length], mask[:, :length], cut

  def __call__(
    self,
    pixels: UInt8[np.ndarray, "I 2 H W 3"],
    input_ids: Int32[np.ndarray, "I L"],
    attention_mask: Int32[np.ndarray, "I L"],
  ) -> list[Comparison]:
    """Says whether a statement about each pair is true."""
    batch = {
      "image_0": pixels[:, 0],
      "image_1": pixels[:, 1],
      "input_ids": input_ids,
      "attention_mask": attention_mask,
    }
    with sharding.activate(self._mesh):
      batch = sharding.put_batch(batch, self._mesh)
      logits = _logits(self._module, self._params, batch)
    false, true = matching.refuse_nan(sharding.local_rows(logits)).T
    prob = np.exp(-np.logaddexp(0, false - true))
    return [
      Comparison(*values)
      for values in zip((true > false).tolist(), prob.tolist(), strict=True)
    ]


@functools.partial(jax.jit, static_argnums=0)
def _logits(module: nlvr.Nlvr, params: med.Params, batch: Any):
  logits = nlvr_task.compare(module, params, batch)
  return spmd.with_logical_constraint(logits, ("batch", None))


def _cleaned(statement: str, max_words: int) -> str:
  return texts.cleaned(statements.cleaned, statement, max_words, NAMES)
