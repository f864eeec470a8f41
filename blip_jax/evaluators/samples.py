"""What the model sees and says: a contact sheet, and captions to read."""

import os
from collections.abc import Iterator

import jax
import numpy as np

from blip_jax.data import sources, transforms
from blip_jax.evaluators import base, caption_generator, ranking
from blip_jax.models import decoding
from blip_jax.runtime import contact_sheet, train_state
from blip_jax.tasks import base as tasks


class Samples:
  """Shows some of the first rows: what is true of a picture, which text it
  ranks first and, if the task writes, a greedy caption.

  A caption is exactly right if it is one of the record's `references` (all
  that may truly be said of a rendered scene) or, without those, its captions.
  """

  def __init__(
    self,
    split: base.Split,
    task: tasks.Task,
    ranking: ranking.Ranking,
    number: int,
    path: str | os.PathLike,
  ):
    self._split = split
    self._ranking = ranking
    self._number = number
    self._path = path
    self._write = None
    if "caption" in task.predict_fns:
      settings = decoding.Decoding(
        split.example.max_length, min_length=0, num_beams=1
      )
      # From [DEC] alone, as pre-training reads captions.
      self._write = caption_generator.CaptionGenerator(
        split, task, settings, prompt=""
      )

  def run(self, state: train_state.TrainState) -> Iterator[tuple[str, float]]:
    rows, ranked = self._ranked_first(state.params)
    chosen = [self._split.source[int(row)] for row in rows]
    cells = [self._cell(*row) for row in zip(chosen, *ranked, strict=True)]
    if self._write is not None:
      written, _ = self._write(state.params, chosen)
      right = [
        self._add_caption(*row)
        for row in zip(cells, chosen, written, strict=True)
      ]
    if jax.process_index() == 0:
      contact_sheet.contact_sheet(cells[: self._number], self._path)
    if self._write is not None:
      if jax.process_index() == 0:
        for cell in cells[:5]:
          true, _, caption = cell.lines
          print(f"  true:    {true.text}\n  written: {caption.text}\n")
      yield "caption_exact", 100.0 * np.mean(right)

  def _ranked_first(self, params: tasks.Params):
    """The first readable rows; the text that each picture ranks first, and
    whether it is one of its own."""
    seen = self._ranking.similarities(params)
    number = min(self._split.batch_size, len(seen.rows))
    first = seen.sim[:number].argmax(axis=1)
    ranked = [self._ranking.texts[t]["caption"] for t in seen.text_rows[first]]
    right = (seen.image_of[first] == np.arange(number)).tolist()
    return seen.rows[:number], (ranked, right)

  def _cell(
    self, record: sources.Record, ranked: str, is_right: bool
  ) -> contact_sheet.Cell:
    lines = [
      contact_sheet.Line("true", sources.captions(record)[0]),
      contact_sheet.Line("ranked first", ranked, is_right),
    ]
    max_pixels = self._split.example.max_pixels
    return contact_sheet.Cell(
      transforms.decode(record["image"], max_pixels), lines
    )

  def _add_caption(self, cell, record: sources.Record, written: str) -> bool:
    right = written in caption_generator.true_captions(
      record, self._split.example
    )
    cell.lines.append(contact_sheet.Line("written", written, right))
    return right
