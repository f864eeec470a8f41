"""What the model sees and says: a contact sheet, and captions to read."""

import os
from collections.abc import Iterator

import jax
import numpy as np

from blip_jax.data import sources, transforms
from blip_jax.evaluators import base, contact_sheet, retrieval
from blip_jax.models import decoding
from blip_jax.runtime import train_state
from blip_jax.tasks import base as tasks


class Samples:
  """Writes greedy captions of the first rows, and shows some of them.

  A caption is exactly right if it is one of the record's `references` (all
  that may truly be said of a rendered scene) or, without those, its captions.
  """

  def __init__(
    self,
    split: base.Split,
    task: tasks.Task,
    ranking: retrieval.Retrieval,
    number: int,
    path: str | os.PathLike,
  ):
    self._split = split
    self._ranking = ranking
    self._number = number
    self._path = path
    settings = decoding.Decoding(
      split.example.max_length, min_length=0, num_beams=1
    )
    # From [DEC] alone, as pre-training reads captions.
    self._write = base.CaptionWriter(split, task, settings, prompt="")

  def run(self, state: train_state.TrainState) -> Iterator[tuple[str, float]]:
    rows, ranked = self._ranked_first(state.params)
    chosen = [self._split.source[int(row)] for row in rows]
    written, _ = self._write(state.params, chosen)
    cells = [
      self._cell(self._split.source[int(row)], *said)
      for row, *said in zip(rows, *ranked, written, strict=True)
    ]
    if jax.process_index() == 0:
      contact_sheet.contact_sheet(cells[: self._number], self._path)
      for true, _, caption in (cell.lines for cell in cells[:5]):
        print(f"  true:    {true.text}\n  written: {caption.text}\n")
    yield "caption_exact", 100.0 * np.mean([c.lines[-1].right for c in cells])

  def _ranked_first(self, params: tasks.Params):
    """The first readable rows; the text that each picture ranks first, and
    whether it is one of its own."""
    sim, image_of, rows, texts = self._ranking.similarities(params)
    number = min(self._split.batch_size, len(rows))
    first = sim[:number].argmax(axis=1)
    ranked = [self._ranking.texts[t]["caption"] for t in texts[first]]
    right = (image_of[first] == np.arange(number)).tolist()
    return rows[:number], (ranked, right)

  def _cell(
    self, record: sources.Record, ranked: str, is_right: bool, written: str
  ) -> contact_sheet.Cell:
    example = self._split.example
    known = base.true_captions(record, example)
    lines = (
      contact_sheet.Line("true", base.captions(record)[0]),
      contact_sheet.Line("ranked first", ranked, is_right),
      contact_sheet.Line("written", written, written in known),
    )
    picture = transforms.decode(record["image"], example.max_pixels)
    return contact_sheet.Cell(picture, lines)
