"""Choices of answers in dialogs about images."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Literal

from blip_jax.inference import choosing
from blip_jax.inference import images as images_lib
from blip_jax.inference.abilities import base
from blip_jax.models import blip


class ChooseMethods(base.Loaded):
  """How `Model` chooses answers."""

  def choose(
    self,
    dialogs: choosing.Dialog | Iterable[choosing.Dialog],
    *,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    progress: bool = False,
  ) -> list[choosing.Choice | None]:
    """Ranks the candidate answers in dialogs about images (section 5.5).

    `choose_stream` yields the results one after the other instead.

    Args:
      dialogs: one or any number of them, each a `blip_jax.Dialog`: an image, a
        question and candidates, and the caption and the history if there are
        any. Texts are read as in training: lower case, most punctuation
        removed; if they are too long, the oldest rounds are left out.
      batch_size: dialogs per batch; by default an eighth of the images that
        suit the devices, for there are many candidates.
      urls: whether an image may be an http(s) URL, which is then downloaded.
      allow_private: whether a URL may lead to addresses that are not public,
        such as those of this machine and its network.
      on_error: what to do about a dialog whose image cannot be read: "raise",
        or "skip", which warns, naming these dialogs, and gives None in their
        place.
      progress: whether to show a progress bar.

    Returns:
      The best candidate of each dialog, in order; the rest are its `others`.

    Raises:
      ValueError: the model does not choose answers, a dialog has no question or
        no candidates, or an image cannot be read; says which.
    """
    return [
      *self.choose_stream(
        dialogs,
        batch_size=batch_size,
        urls=urls,
        allow_private=allow_private,
        on_error=on_error,
        progress=progress,
      )
    ]

  def choose_stream(
    self,
    dialogs: choosing.Dialog | Iterable[choosing.Dialog],
    *,
    batch_size: int | None = None,
    urls: bool = False,
    allow_private: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    progress: bool = False,
  ) -> Iterator[choosing.Choice | None]:
    """Chooses answers in any number of dialogs, in little memory.

    Images are read at most two batches ahead, so that `dialogs` may be an
    iterator over millions.

    Args:
      dialogs: as for `choose`, and so are the other arguments.

    Returns:
      An iterator of one result per dialog, in order; None for a dialog that was
      skipped.

    Raises:
      ValueError: as `choose`; before the first image is read, unless it is
        about a dialog.
    """
    chooser = self.chooser()
    read_ahead, following = itertools.tee(choosing.checked(dialogs))
    read = choosing.DialogReader(self.image, urls, allow_private=allow_private)
    size = self._batch_size(batch_size, of_image=8)
    batches = images_lib.batches(
      read_ahead, read, size, self.mesh, on_error, progress
    )
    return choosing.results(batches, following, chooser)

  def chooser(self) -> choosing.Chooser:
    """Returns an object that chooses answers in batches of dialogs.

    Use it to load images by other means than `choose` does. Each size of a
    batch is compiled once.

    Raises:
      ValueError: the model does not choose answers.
    """
    if self.card.family != "dialog" or not isinstance(self.module, blip.Blip):
      raise self._lacks(
        "cannot choose answers in dialogs",
        "None was released: train one with --config dialog_custom or visdial, "
        "and load its workdir",
      )
    return choosing.Chooser(self.module, self.params, self.tokenizer, self.mesh)
