"""Whether statements about two images are true."""

from collections.abc import Iterable, Iterator
from typing import Literal

from blip_jax.inference import comparing
from blip_jax.inference import images as images_lib
from blip_jax.inference import texts as texts_lib
from blip_jax.inference.abilities import base
from blip_jax.models import nlvr


class CompareMethods(base.Loaded):
  """How `Model` compares images."""

  def compare(
    self,
    image_pairs: comparing.Pair | Iterable[comparing.Pair],
    statements: str | Iterable[str],
    *,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    progress: bool = False,
  ) -> list[comparing.Comparison | None]:
    """Says whether statements about two images each are true (section 5.4).

    `compare_stream` yields the results one after the other instead.

    Args:
      image_pairs: a pair of images, the left one first, or any number of them;
        images as for `caption`.
      statements: one about each pair, one about all of them, or any number
        about a single pair. They are read as in training: lower case, most
        punctuation removed, at most 40 words.
      batch_size: pairs per batch; by default half as many as images that suit
        the devices.
      urls: whether an image may be an http(s) URL, which is then downloaded.
      allow_private: whether a URL may lead to addresses that are not public,
        such as those of this machine and its network.
      on_error: what to do about a pair one of whose images cannot be read:
        "raise", or "skip", which warns, naming these pairs, and gives None in
        their place.
      progress: whether to show a progress bar.

    Returns:
      One result per statement, in order.

    Raises:
      ValueError: the model does not compare images, there are not as many
        statements as pairs, a statement has no words, or an image cannot be
        read; says which.
    """
    return [
      *self.compare_stream(
        image_pairs,
        statements,
        batch_size=batch_size,
        urls=urls,
        allow_private=allow_private,
        on_error=on_error,
        progress=progress,
      )
    ]

  def compare_stream(
    self,
    image_pairs: comparing.Pair | Iterable[comparing.Pair],
    statements: str | Iterable[str],
    *,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    progress: bool = False,
  ) -> Iterator[comparing.Comparison | None]:
    """Compares any number of pairs of images, in little memory.

    Images are read at most two batches ahead, so that `image_pairs` and
    `statements` may be iterators over millions.

    Args:
      image_pairs: as for `compare`, and so are the other arguments.

    Returns:
      An iterator of one result per statement, in order; None for a pair that
      was skipped.

    Raises:
      ValueError: as `compare`; before the first image is read, unless it is
        about an image or a statement.
    """
    comparer = self.comparer()
    size = self._batch_size(batch_size, of_image=2)
    pairs = comparing.as_pairs(image_pairs)
    asked = texts_lib.Asked(
      *texts_lib.paired(pairs, statements, comparing.NAMES),
      comparing.NAMES,
      size,
    )
    read = comparing.PairReader(self.image, urls, allow_private=allow_private)
    batches = images_lib.batches(
      asked.images, read, size, self.mesh, on_error, progress
    )
    return texts_lib.results(batches, asked, comparer)

  def comparer(self) -> comparing.Comparer:
    """Returns an object that compares batches of pixels and tokens.

    Use it to load images by other means than `compare` does. Each size of a
    batch is compiled once.

    Raises:
      ValueError: the model does not compare images.
    """
    if not isinstance(self.module, nlvr.Nlvr):
      raise self._lacks(
        "cannot compare two images",
        "Load a model for NLVR2, such as 'model_base_nlvr'",
      )
    return comparing.Comparer(
      self.module, self.params, self.tokenizer, self.mesh
    )
