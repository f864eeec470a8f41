"""The demo page: tabs around `serve.actions`, drawn by Gradio (extra [demo]).

Importing this module needs Gradio. Nothing of the page comes from another
machine, and nothing is told to one.
"""

import html
from collections.abc import Sequence
from typing import Any

from blip_jax.inference import matching
from blip_jax.serve import actions as actions_lib
from blip_jax.serve import widgets
from blip_jax.serve.actions import Actions, Gallery
from blip_jax.serve.widgets import gr  # once it reports nothing

TITLE = "blip_jax"
# Requests that use the device at the same time.
AT_ONCE: dict[str, Any] = dict(concurrency_id="device", concurrency_limit=1)
# Without fonts from the web.
THEME = gr.themes.Default(
  font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
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
    return widgets.upload(label, self._max_bytes)

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
          headers=actions_lib.CAPTION_COLUMNS,
          label="Captions, by log-probability per token",
          column_widths=["12%", "58%", "30%"],
          wrap=True,
        )
        look = widgets.Look(image)
        words = gr.Dataframe(
          headers=actions_lib.WORD_COLUMNS,
          label="Tokens",
          column_widths=["12%", "28%", "30%", "30%"],
          wrap=True,
          max_height=260,
        )
    self._draw_examples([image])

    done = run.click(
      widgets.guarded(self._actions.caption),
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
      widgets.guarded(self._actions.answer),
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
          label="Texts, one on each line",
          info=f"Of each, {matching.MAX_WORDS} words are read at most.",
          lines=4,
          max_length=20_000,
        )
        run = gr.Button("Match", variant="primary")
      with gr.Column():
        table = gr.Dataframe(
          headers=actions_lib.MATCH_COLUMNS,
          label="Texts, the best first",
          column_widths=["43%", "22%", "16%", "19%"],
          max_chars=200,
          wrap=True,
        )
        text = gr.Dropdown([], label="Text to explain")
        look = widgets.Look(image)
    self._draw_examples([image, texts])

    def match(image: bytes | None, texts: str):
      """Ranks texts by how well they match an image."""
      rows = self._actions.match(image, texts)
      best = [row[0] for row in rows]
      return rows, gr.Dropdown(choices=best, value=best[0])

    def look_for(image: bytes | None, text: str):
      return [self._actions.explain(image, text)] if text else []

    matched = run.click(
      widgets.guarded(match),
      [image, texts],
      [table, text],
      api_name="match",
      api_description="Texts, one on each line, ranked by how well they match "
      "an image.",
      **AT_ONCE,
    )
    look.clear_after(matched.failure)
    for event in (matched.success, text.input):
      look.follow(
        event(
          widgets.guarded(look_for),
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
      shown = gr.Image(format="png", buttons=widgets.BUTTONS)

    def explain(image: bytes | None, text: str, words: str = "") -> Any:
      return self._actions.explain(image, text).overlay(words or None, image)

    gr.Button(visible=False).click(
      widgets.guarded(explain),
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
          value=self._examples[0][1].split("\n")[0] if self._examples else "",
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
          buttons=widgets.BUTTONS,
        )

    def search(text: str, image: bytes | None = None, top: int = 8) -> Any:
      return self._actions.search(gallery, text, image, top)

    run.click(
      widgets.guarded(search),
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
          headers=actions_lib.COMPARE_COLUMNS,
          label="Statements",
          column_widths=["56%", "14%", "30%"],
          wrap=True,
        )
    run.click(
      widgets.guarded(self._actions.compare),
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
