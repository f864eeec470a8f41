"""Samples to look at: a contact sheet, and captions in the log."""

from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Int

from blip_jax.data import sources
from blip_jax.evaluators import (
  base,
  caption_generator,
  ranking,
  references,
  result_file,
)
from blip_jax.evaluators.scores import caption_metrics
from blip_jax.models import decoding
from blip_jax.runtime import contact_sheet, train_state
from blip_jax.tasks import base as tasks


class Samples:
  """Shows the first images: a true caption, the text that the model ranks first
  and, if the task generates captions, a greedy caption.

  `caption_exact` is the percentage of captions that are exactly right; see
  `caption_generator.is_right`.

  Args:
    split: held-out pairs, the same as those of the ranking.
    task: the task of the model.
    ranking: the split's ranking.
    num_shown: images on the contact sheet.
    sheet: contact sheet.
  """

  def __init__(
    self,
    split: base.Split,
    task: tasks.Task,
    ranking: ranking.Ranking,
    num_shown: int,
    sheet: result_file.ResultFile,
  ):
    self._split = split.by_image
    self._ranking = ranking
    self._num_shown = num_shown
    self._sheet = sheet
    self._generate = None
    if "caption" in task.predict_fns:
      settings = decoding.Decoding(
        split.example.max_length, min_length=0, num_beams=1
      )
      # Without a prompt, as in pre-training.
      self._generate = caption_generator.CaptionGenerator(
        self._split, task, settings, prompt=""
      )

  def run(self, state: train_state.TrainState) -> Iterator[tuple[str, float]]:
    rows, texts, is_right = self._top_ranked(state.params)
    records = [self._split.source[int(row)] for row in rows]
    lines = [
      [
        contact_sheet.Line("true", references.texts(record)[0]),
        contact_sheet.Line("top-ranked", text, right),
      ]
      for record, text, right in zip(records, texts, is_right, strict=True)
    ]
    exact = []
    if self._generate is not None:
      captions, _ = self._generate(state.params, records)
      exact, generated = self._compared(captions, records)
      for own_lines, line in zip(lines, generated, strict=True):
        own_lines.append(line)
    cells = [
      contact_sheet.Cell(caption_generator.thumbnail(record), own_lines)
      for record, own_lines in zip(
        records[: self._num_shown], lines, strict=False
      )
    ]
    if jax.process_index() == 0:
      with self._sheet.writing() as path:
        contact_sheet.contact_sheet(cells, path)
    if self._generate is not None:
      if jax.process_index() == 0:
        for true, _, caption in lines[:5]:
          print(f"  true:      {true.text}\n  generated: {caption.text}\n")
      yield "caption_exact", 100.0 * float(np.mean(exact))

  def _compared(
    self, captions: list[str], records: list[sources.Record]
  ) -> tuple[list[bool], list[contact_sheet.Line]]:
    """Which captions are exactly right, and how the sheet shows them."""
    scores = caption_metrics.score(
      dict(enumerate(captions)),
      {n: references.texts(record) for n, record in enumerate(records)},
    )
    exact, lines = [], []
    for n, (caption, record) in enumerate(zip(captions, records, strict=True)):
      right = caption_generator.is_right(caption, record, self._split.example)
      rouge_l = scores.per_image[n]["ROUGE_L"]
      exact.append(right)
      lines.append(caption_generator.line(caption, record, right, rouge_l))
    return exact, lines

  def _top_ranked(
    self, params: tasks.Params
  ) -> tuple[Int[np.ndarray, " n"], list[str], list[bool]]:
    """The first readable rows, the text that each image ranks first, and
    whether it is one of the image's own."""
    similarities = self._ranking.similarities(params)
    num_rows = min(self._split.batch_size, len(similarities.rows))
    best = similarities.sim[:num_rows].argmax(axis=1)
    texts = [
      self._ranking.texts[row]["caption"]
      for row in similarities.text_rows[best]
    ]
    right = similarities.image_of[best] == np.arange(num_rows)
    return similarities.rows[:num_rows], texts, right.tolist()
