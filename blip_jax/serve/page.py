"""The demo page: tabs around `serve.actions`, drawn by Gradio (extra [demo]).

Importing this module needs Gradio. Nothing of the page comes from another
machine, and nothing is told to one.
"""

import base64
import functools
import html
import logging
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

# Gradio reports each start to its makers otherwise.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr  # pyright: ignore[reportMissingImports]
from gradio.themes import (  # pyright: ignore[reportMissingImports]
  Default,
)

from blip_jax.inference.explanation import Explanation
from blip_jax.runtime import command, files
from blip_jax.serve import actions as actions_lib
from blip_jax.serve.actions import Actions, Gallery

log = logging.getLogger(__name__)

TITLE = "blip_jax"
WHOLE = "the whole text"
# Requests that use the device at the same time.
AT_ONCE: dict[str, Any] = dict(concurrency_id="device", concurrency_limit=1)
# Of images that are shown: not the one that uploads them to be shared.
BUTTONS: Any = ["download", "fullscreen"]
# Without fonts from the web.
THEME = Default(
  font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)


def upload(label: str, max_bytes: int) -> gr.Image:
  """An image that functions get as the bytes that were uploaded.

  Gradio would decode it; our own reader does, within its limits.
  """
  image: Any = gr.Image(
    label=label,
    type="filepath",
    image_mode=None,
    sources=["upload", "clipboard"],
    height=300,
  )
  # Of the object: for a subclass, Gradio writes a file next to this one.
  image.preprocess = functools.partial(_content, max_bytes)
  return image


def _content(max_bytes: int, payload: Any) -> bytes | None:
  """The bytes of an uploaded file, or of a data URL."""
  if payload is None:
    return None
  if payload.path is None:
    _, comma, text = (payload.url or "").partition(";base64,")
    if not comma:
      raise gr.Error("An image is an uploaded file or a data URL.")
    _check_size(len(text) * 3 // 4, max_bytes)
    try:
      return base64.b64decode(text, validate=True)
    except ValueError as error:
      raise gr.Error("The data URL is no base64.") from error
  path = pathlib.Path(payload.path)
  _check_size(path.stat().st_size, max_bytes)
  return files.read_bytes(path)


def _check_size(size: int, max_bytes: int) -> None:
  if size > max_bytes:
    raise gr.Error(
      f"The image has {size / 2**20:.1f} MB; expected at most "
      f"{max_bytes >> 20}."
    )


def build(
  actions: Actions,
  gallery: Gallery | None,
  examples: Sequence[tuple[str, str]],
  max_bytes: int,
) -> gr.Blocks:
  """Returns the page.

  Args:
    actions: of the models.
    gallery: to search; None if no model can embed images.
    examples: paths of images, each with a text that fits.
    max_bytes: of an uploaded image.
  """
  tabs = _Tabs(actions, gallery, examples, max_bytes)
  with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
    gr.Markdown(
      "# blip_jax\nCaptions, answers, matches and search with BLIP. Upload an "
      "image or click on an example."
    )
    for name, ability, draw in [
      ("Caption", "caption", tabs.caption),
      ("Ask", "answer", tabs.answer),
      ("Match", "match", tabs.match),
      ("Search", "embed", tabs.search),
      ("Compare", "compare", tabs.compare),
    ]:
      with gr.Tab(name, id=name.lower()):
        reason = actions.lacks(ability)
        if reason is None:
          draw()
        else:
          gr.Markdown(
            f"**This tab is off.** {html.escape(reason, quote=False)}"
          )
  return page


class _Tabs:
  """Draws one tab each; see `build`."""

  def __init__(
    self,
    actions: Actions,
    gallery: Gallery | None,
    examples: Sequence[tuple[str, str]],
    max_bytes: int,
  ):
    self._actions, self._gallery = actions, gallery
    self._examples = examples
    self._max_bytes = max_bytes

  def _upload(self, label: str = "Image") -> gr.Image:
    return upload(label, self._max_bytes)

  def caption(self) -> None:
    with gr.Row():
      with gr.Column():
        image = self._upload()
        method = gr.Radio(
          actions_lib.METHODS, value=actions_lib.METHODS[0], label="Method"
        )
        with gr.Row():
          number = gr.Slider(1, 8, 1, step=1, label="Captions")
          beams = gr.Slider(1, 10, 3, step=1, label="Beams")
        with gr.Row():
          shortest = gr.Slider(1, 30, 5, step=1, label="Least tokens")
          longest = gr.Slider(2, 40, 20, step=1, label="Most tokens")
        prompt = gr.Textbox(
          label="Prompt", placeholder="unset: the model's own", max_length=200
        )
        with gr.Accordion("Sampling", open=False):
          top_p = gr.Slider(0.05, 1, 0.9, label="Top p")
          temperature = gr.Slider(0.1, 2, 1.0, label="Temperature")
          seed = gr.Number(0, precision=0, minimum=0, label="Seed")
        run = gr.Button("Caption", variant="primary")
      with gr.Column():
        table = gr.Dataframe(
          headers=actions_lib.CAPTION_COLUMNS, label="Captions", wrap=True
        )
        look = _Look(image)
        words = gr.Dataframe(
          headers=actions_lib.WORD_COLUMNS,
          label="Tokens",
          wrap=True,
          max_height=260,
        )
    self._draw_examples([image])

    done = run.click(
      _guarded(self._actions.caption),
      [
        image,
        method,
        beams,
        shortest,
        longest,
        prompt,
        number,
        top_p,
        temperature,
        seed,
      ],
      [table, words, look.state],
      api_name="caption",
      api_description="Captions of an image: a table of captions and their "
      "log-probabilities, and one of their tokens.",
      **AT_ONCE,
    )
    look.follow(done)

  def answer(self) -> None:
    with gr.Row():
      with gr.Column():
        image = self._upload()
        question = gr.Textbox(
          label="Question", value="what color is it?", max_length=500
        )
        answers = gr.Textbox(
          label="Possible answers, one on each line (none: any text)",
          lines=3,
          max_length=100_000,
        )
        number = gr.Slider(1, 10, 3, step=1, label="Answers")
        run = gr.Button("Ask", variant="primary")
      with gr.Column():
        table = gr.Dataframe(
          headers=actions_lib.ANSWER_COLUMNS, label="Answers", wrap=True
        )
    self._draw_examples([image])
    run.click(
      _guarded(self._actions.answer),
      [image, question, answers, number],
      table,
      api_name="answer",
      api_description="Answers to a question about an image, with "
      "probabilities.",
      **AT_ONCE,
    )

  def match(self) -> None:
    with gr.Row():
      with gr.Column():
        image = self._upload()
        texts = gr.Textbox(
          label="Texts, one on each line", lines=4, max_length=20_000
        )
        run = gr.Button("Match", variant="primary")
      with gr.Column():
        table = gr.Dataframe(
          headers=actions_lib.MATCH_COLUMNS,
          label="Texts, the best first",
          wrap=True,
        )
        text = gr.Dropdown([], label="Text to explain")
        look = _Look(image)
    self._draw_examples([image, texts])

    def match(image: bytes | None, texts: str):
      """Ranks texts by how well they match an image."""
      rows = self._actions.match(image, texts)
      best = [row[0] for row in rows]
      return rows, gr.Dropdown(choices=best, value=best[0])

    def look_for(image: bytes | None, text: str):
      return [self._actions.explain(image, text)] if text else []

    matched = run.click(
      _guarded(match),
      [image, texts],
      [table, text],
      api_name="match",
      api_description="Texts, one on each line, ranked by how well they match "
      "an image.",
      **AT_ONCE,
    )
    for event in (matched.success, text.input):
      look.follow(
        event(
          _guarded(look_for),
          [image, text],
          look.state,
          api_visibility="private",
          **AT_ONCE,
        )
      )

    self._draw_explain_api()

  def _draw_explain_api(self) -> None:
    """What programs call for an overlay of their own words."""
    with gr.Column(visible=False):
      image, text = self._upload(), gr.Textbox(label="Text")
      words = gr.Textbox(label="Words of the text; none: all of it")
      shown = gr.Image(format="png", buttons=BUTTONS)

    def explain(image: bytes | None, text: str, words: str = "") -> Any:
      return self._actions.explain(image, text).overlay(words or None, image)

    gr.Button(visible=False).click(
      _guarded(explain),
      [image, text, words],
      shown,
      api_name="explain",
      api_description="An image, coloured where its match with words of a text "
      "rests on it.",
      **AT_ONCE,
    )

  def search(self) -> None:
    gallery = self._gallery
    assert gallery is not None  # there is one if a model can embed
    with gr.Row():
      with gr.Column():
        text = gr.Textbox(
          label=f"Text; {len(gallery.index.ids)} images are searched",
          value=self._examples[0][1] if self._examples else "",
          max_length=500,
        )
        image = self._upload("Or an image")
        top = gr.Slider(
          1, actions_lib.MAX_FOUND, 8, step=1, label="Images to find"
        )
        run = gr.Button("Search", variant="primary")
      with gr.Column(scale=2):
        found = gr.Gallery(
          label="Found, the best first",
          columns=4,
          format="png",
          object_fit="contain",
          buttons=BUTTONS,
        )

    def search(text: str, image: bytes | None = None, top: int = 8) -> Any:
      return self._actions.search(gallery, text, image, top)

    run.click(
      _guarded(search),
      [text, image, top],
      found,
      api_name="search",
      api_description="The images nearest to a text, or to an image.",
      **AT_ONCE,
    )

  def compare(self) -> None:
    with gr.Row():
      with gr.Column():
        with gr.Row():
          left, right = self._upload("Left image"), self._upload("Right image")
        statements = gr.Textbox(
          label="Statements, one on each line", lines=3, max_length=20_000
        )
        run = gr.Button("Compare", variant="primary")
      with gr.Column():
        table = gr.Dataframe(
          headers=actions_lib.COMPARE_COLUMNS, label="Statements", wrap=True
        )
    run.click(
      _guarded(self._actions.compare),
      [left, right, statements],
      table,
      api_name="compare",
      api_description="Whether statements are true of two images.",
      **AT_ONCE,
    )

  def _draw_examples(self, inputs: list[Any]) -> None:
    if self._examples:
      rows = [list(example[: len(inputs)]) for example in self._examples]
      gr.Examples(rows, inputs, label="Examples", api_visibility="private")


class _Look:
  """Words to choose from, and the image coloured where they rest on it."""

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
    self._word.input(
      _guarded(self._draw),
      [image, self.state, self._word],
      self._overlay,
      api_visibility="private",
      show_progress="hidden",
    )

  def follow(self, event: Any) -> None:
    """Shows the words of the explanations once an event has set the state."""
    event.success(
      self._words, self.state, self._word, api_visibility="private"
    ).then(
      _guarded(self._draw),
      [self._image, self.state, self._word],
      self._overlay,
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


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
  """A function whose errors a visitor can read; bugs go to the log only."""

  @functools.wraps(function)
  def guarded(*args: Any) -> Any:
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

  return guarded
