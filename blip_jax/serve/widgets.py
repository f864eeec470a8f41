"""Parts of the demo page: uploads, saliency, functions that cannot fail.

Importing this module needs Gradio.
"""

import abc
import functools
import html
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

# Gradio reports each start to its makers otherwise.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr  # pyright: ignore[reportMissingImports]

from blip_jax.inference.explanation import Explanation
from blip_jax.runtime import command, files
from blip_jax.serve import actions as actions_lib
from blip_jax.serve import data_urls

log = logging.getLogger(__name__)

WHOLE = "the whole text"
# Of images that are shown: not the one that uploads them to be shared.
BUTTONS: Any = ["download", "fullscreen"]


def upload(label: str, max_bytes: int) -> gr.Image:
  """An image that functions get as the bytes that were uploaded.

  Gradio would decode it; our own reader does, within its limits.
  """
  return _upload_class(max_bytes)(
    label=label,
    type="filepath",
    image_mode=None,
    sources=["upload", "clipboard"],
    height=300,
  )


@functools.cache
def _upload_class(max_bytes: int) -> Any:
  """A class of Gradio's name, for sessions make objects of it again."""
  members = {
    "__module__": __name__,
    "preprocess": lambda self, payload: _content(max_bytes, payload),
  }
  # Made by its metaclass, Gradio would write a file next to this one.
  return abc.ABCMeta.__new__(type(gr.Image), "Image", (gr.Image,), members)


def _content(max_bytes: int, payload: Any) -> bytes | None:
  """The bytes of an uploaded file, or of a data URL."""
  if payload is None:
    return None
  if payload.path is None:
    url = payload.url or ""
    _check_size(len(url) * 3 // 4, max_bytes)
    try:
      return data_urls.decode(url)
    except ValueError as error:
      raise gr.Error(f"Not an uploaded file: {error}") from error
  path = pathlib.Path(payload.path)
  _check_size(path.stat().st_size, max_bytes)
  return files.read_bytes(path)


def _check_size(size: int, max_bytes: int) -> None:
  if size > max_bytes:
    raise gr.Error(
      f"The image has {size / 2**20:.1f} MB; expected at most "
      f"{max_bytes >> 20}."
    )


class Look:
  """Words to choose from, and the image coloured where they rest on it.

  They go when the image changes, or what they would be of fails.
  """

  def __init__(self, image: gr.Image):
    self._image = image
    self.state = gr.State([])
    self._word = gr.Radio([], label="Where does the model look for", value=None)
    self._overlay = gr.Image(
      label="Saliency",
      interactive=False,
      format="png",
      height=300,
      elem_classes="saliency",
      buttons=BUTTONS,
    )
    self.clear_after(image.change)
    self._word.input(
      guarded(self._draw),
      [image, self.state, self._word],
      self._overlay,
      api_visibility="private",
      show_progress="hidden",
    )

  def follow(self, event: Any) -> None:
    """Shows the words of the explanations once an event has set the state."""
    self.clear_after(event.failure)
    event.success(
      self._words, self.state, self._word, api_visibility="private"
    ).then(
      guarded(self._draw),
      [self._image, self.state, self._word],
      self._overlay,
      api_visibility="private",
      show_progress="hidden",
    )

  def clear_after(self, listener: Callable[..., Any]) -> None:
    """Shows nothing once an event happens, such as `image.change`."""
    listener(
      lambda: ([], gr.Radio(choices=[], value=None), None),
      None,
      [self.state, self._word, self._overlay],
      queue=False,
      api_visibility="private",
      show_progress="hidden",
    )

  def _words(self, explanations: list[Explanation]) -> Any:
    choices = []
    for number, explanation in enumerate(explanations):
      prefix = f"{number + 1}: " if len(explanations) > 1 else ""
      choices.append((prefix + WHOLE, f"{number}/"))
      choices += [
        (prefix + word, f"{number}/{position}")
        for position, word in enumerate(explanation.words)
      ]
    return gr.Radio(choices=choices, value="0/" if choices else None)

  def _draw(
    self,
    image: bytes | None,
    explanations: list[Explanation],
    chosen: str | None,
  ) -> Any:
    if not explanations or chosen is None:
      return None
    number, _, word = chosen.partition("/")
    return actions_lib.overlay(
      explanations[int(number)], int(word) if word else None, image
    )


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
  """A function whose errors a visitor can read; bugs go to the log only."""

  @functools.wraps(function)
  def run(*args: Any) -> Any:
    try:
      return function(*args)
    except gr.Error:
      raise
    except Exception as error:
      if command.is_mistake(error):
        shown = html.escape(command.message(error), quote=False)
        raise gr.Error(shown, print_exception=False) from error
      log.exception("A request failed")
      raise gr.Error(
        "Internal error; the log of the server says more.",
        print_exception=False,
      ) from error

  return run
