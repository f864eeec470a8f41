"""Texts that come with images: one for each, or one for all of them."""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import (
  Callable,
  Generator,
  Iterable,
  Iterator,
  Sequence,
  Sized,
)
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32

from blip_jax.data import rejects
from blip_jax.data import tokenizer as tokenizer_lib

log = logging.getLogger(__name__)

# Texts are padded to a multiple of this, so that few programs serve all.
TOKENS = 8
_MAX_NAMED = 3
# In place of a text, in a batch that is not full.
_FILLING = "what"


class Names(NamedTuple):
  """What errors call a method, what it is about, and the texts."""

  method: str
  image: str
  text: str


def paired(
  images: Iterable[Any],
  texts: str | Iterable[str],
  names: Names,
  each: int = 1,
) -> tuple[Iterable[Any], Iterator[str]]:
  """Returns images, or pairs of them, and their texts.

  Args:
    images: any number.
    texts: one about all images, or one about each; or any number about a single
      image.
    names: for errors.
    each: a single image is returned once for so many texts.

  Raises:
    ValueError: their numbers are known and differ.
  """
  if isinstance(texts, str):
    return images, itertools.repeat(texts)
  if _are_about_one(images, texts):
    texts, again = itertools.tee(texts)
    return _repeated(images, again, each), texts
  if isinstance(images, Sized) and isinstance(texts, Sized):
    num_images, num_texts = len(images), len(texts)
    if num_images != num_texts:
      method, image, text = names
      raise ValueError(
        f"{method}: expected a {text} for each {image}, one for all {image}s, "
        f"or one {image}, found {num_images} {image}s and {num_texts} {text}s"
      )
  return images, iter(texts)


def _are_about_one(images: Iterable[Any], texts: str | Iterable[str]) -> bool:
  """Whether these are, or may be, several texts about a single image."""
  is_single = isinstance(images, Sized) and len(images) == 1
  if not is_single or isinstance(texts, str):
    return False
  return not isinstance(texts, Sized) or len(texts) > 1


def _repeated(
  images: Iterable[Any], texts: Iterator[str], each: int
) -> Iterator[Any]:
  """Yields a single image once for so many texts, as long as there are any."""
  (image,) = images
  while [*itertools.islice(texts, each)]:
    yield image


@dataclasses.dataclass(frozen=True)
class Asked:
  """Images, and the texts about them in the same order.

  Attributes:
    images: any number.
    texts: about them.
    names: for errors.
    batch_size: images of a batch.
    texts_per_image: the last image may have fewer.
  """

  images: Iterable[Any]
  texts: Iterator[str]
  names: Names
  batch_size: int
  texts_per_image: int = 1

  def following(self, num_images: int) -> list[str]:
    """Returns the texts about the next images; raises as `following`."""
    return following(self.texts, num_images, self.names, self.texts_per_image)

  def has_more(self) -> bool:
    """Whether texts are left, other than one that is about all images."""
    is_for_all = isinstance(self.texts, itertools.repeat)
    return not is_for_all and next(self.texts, None) is not None


def asked(
  images: Iterable[Any],
  texts: str | Iterable[str],
  names: Names,
  batch_size: int,
  num_texts: int,
  num_shards: int,
) -> Asked:
  """Pairs images with texts as `paired` does, but for a single image.

  Each shard of the devices has a copy of that, and encodes it once for its
  share of a batch of texts.

  Args:
    images, texts, names: as for `paired`.
    batch_size: images of a batch.
    num_texts: of a batch about a single image.
    num_shards: over which devices split a batch.
  """
  if not _are_about_one(images, texts):
    return Asked(*paired(images, texts, names), names, batch_size)
  each = max(num_texts // num_shards, 1)
  if isinstance(texts, Sized):
    share = -(-len(texts) // num_shards)
    # The next power of two, so that few programs serve all numbers.
    each = min(1 << (share - 1).bit_length(), each)
  return Asked(*paired(images, texts, names, each), names, num_shards, each)


def following(
  texts: Iterator[str], num_images: int, names: Names, per_image: int = 1
) -> list[str]:
  """Returns the texts about the next images.

  Args:
    per_image: texts about each of them; the last one may have fewer.

  Raises:
    ValueError: there are fewer, or one is no text.
  """
  method, image, text = names
  found = list(itertools.islice(texts, num_images * per_image))
  if len(found) < num_images:
    raise ValueError(f"{method}: there are fewer {text}s than {image}s")
  for each in found:
    if not isinstance(each, str):
      raise ValueError(f"{method}: expected a {text}, found {each!r:.200}")
  return found


@runtime_checkable
class Runner(Protocol):
  """What answers texts about images.

  Attributes:
    max_words, max_tokens: of a text; longer ones are cut.
  """

  max_words: int
  max_tokens: int

  def tokens(self, texts: Sequence[str], /) -> tuple[Any, Any, list[str]]:
    """Ids and mask of texts, and those that were cut."""
    ...

  def __call__(self, pixels: Any, ids: Any, mask: Any, /) -> list[Any]:
    """A result for each text, those about one image together."""
    ...


def results(
  batches: Generator[tuple[Any, Sequence[Any]], None, None],
  asked: Asked,
  run: Runner,
) -> Iterator[Any]:
  """Yields a result for each text, None if its image was skipped.

  Args:
    batches: pixels, and an error or None for each image; the last ones may be
      there only to fill the batch.
    asked: the texts about them.
    run: called once a batch. Texts that it cuts, and those without an image,
      are reported at the end.
  """
  cut: list[str] = []
  each = asked.texts_per_image
  with contextlib.closing(batches):
    for pixels, errors in batches:
      texts = asked.following(len(errors))
      filling = [_FILLING] * (len(pixels) * each - len(texts))
      ids, mask, long = run.tokens([*texts, *filling])
      cut += long
      found = run(pixels, ids, mask)
      for number, one in enumerate(found[: len(texts)]):
        yield one if errors[number // each] is None else None
  if asked.has_more():
    method, image, text = asked.names
    log.warning(
      "%s: there are more %ss than %ss; the others were left out",
      *(method, text, image),
    )
  if cut:
    log.warning(
      "%d %ss have more than %d words or %d tokens, and were cut: %s",
      *(len(cut), asked.names.text, run.max_words, run.max_tokens),
      "; ".join(repr(text)[:200] for text in cut[:_MAX_NAMED]),
    )


def vocabulary(
  tokenizer: tokenizer_lib.Tokenizer | None, act: str
) -> tokenizer_lib.Tokenizer:
  """The tokenizer of a model; `ValueError` if it has none, and cannot `act`."""
  if tokenizer is None:
    raise ValueError(
      f"this model has no vocabulary, so it cannot {act}; load it with "
      "tokenizer=, a folder with its vocab.txt"
    )
  return tokenizer


def cleaned(
  clean: Callable[[str, int], str], text: str, max_words: int, names: Names
) -> str:
  """A text as models read it; `ValueError` if it is none."""
  try:
    return clean(text, max_words)
  except rejects.BadSample as error:
    is_empty = error.reason == "empty_caption"
    why = "empty: expected words" if is_empty else error
    raise ValueError(f"{names.text} {text[:200]!r}: {why}") from error


def encode(
  tokenizer: tokenizer_lib.Tokenizer, texts: Sequence[str], max_tokens: int
) -> tuple[
  Int32[np.ndarray, "B L"], Int32[np.ndarray, "B L"], Bool[np.ndarray, " B"]
]:
  """Returns ids and mask of texts, and which of them are cut."""
  ids, mask = tokenizer.encode(texts, max_tokens + 1)
  is_cut = mask[:, -1] == 1
  if is_cut.any():
    ids, mask = tokenizer.encode(texts, max_tokens)
  return ids[:, :max_tokens], mask[:, :max_tokens], is_cut


def padded_length(longest: int, max_tokens: int) -> int:
  """The length that texts of at most `longest` tokens are padded to."""
  return min(-(-longest // TOKENS) * TOKENS, max_tokens)
