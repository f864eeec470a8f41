"""Captions of a split: written, kept as COCO's server wants them, scored."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from blip_jax.data import datasets, sources, transforms
from blip_jax.evaluators import base, caption_generator, held_out_loss
from blip_jax.evaluators.scores import caption_files
from blip_jax.evaluators.scores import caption_metrics as scores
from blip_jax.models import decoding
from blip_jax.runtime import (
  contact_sheet,
  files,
  train_state,
)
from blip_jax.tasks import base as tasks


def build(of: base.Context) -> list[base.Evaluator]:
  """Generated captions with their scores, behind the losses of true ones."""
  settings = of.settings
  # NoCaps has images whose captions only its server knows.
  has_captions = settings.references != "none"
  open_rows = datasets.open_source if has_captions else datasets.open_images
  split = of.split(open_rows(settings.source, settings.image_root))
  references = None
  if has_captions and settings.references:
    references = caption_files.read_references(settings.references)
  prompt_ids = split.example.tokenizer.prompt_ids(split.example.prompt)
  generated = Captions(
    split,
    of.task,
    decoding.make(
      of.config.generation.to_dict(),
      len(prompt_ids),
      of.task.model.config.med.max_positions,
    ),
    references,
    of.file(f"{of.name}_captions.json"),
    of.file("samples.png"),
    settings.samples,
  )
  if not has_captions:
    return [generated]
  return [held_out_loss.HeldOutLoss(split, of.task), generated]


class Captions:
  """Writes a caption of every picture of a split.

  A caption is exactly right if it is one of the record's `references` (all
  that may truly be said of a rendered scene) or, without those, its captions.

  Args:
    split: whose records have captions; without them nothing is scored.
    settings: how to decode.
    references: captions of people by `image_id`, if not those of the records.
    results: gets a list of {image_id, caption}, each picture once.
    sheet: gets the first pictures with their captions, if any are to be shown.
    number: of pictures shown.
  """

  def __init__(
    self,
    split: base.Split,
    task: tasks.Task,
    settings: decoding.Decoding,
    references: Mapping[Any, Sequence[str]] | None,
    results: str | os.PathLike,
    sheet: str | os.PathLike,
    number: int,
  ):
    self._split = split
    self._references = references
    self._results = results
    self._sheet = sheet
    self._number = number
    self._write = caption_generator.CaptionGenerator(
      split, task, settings, split.example.prompt
    )

  def run(self, state: train_state.TrainState) -> Iterator[tuple[str, float]]:
    texts, valid = self._write(state.params)
    written = {row: texts[row] for row in np.flatnonzero(valid).tolist()}
    records = self._split.source
    names = _names(map(records.__getitem__, written))
    captions, truths, right, cells = {}, {}, [], []
    for (row, text), name in zip(written.items(), names, strict=True):
      record = records[row]
      captions.setdefault(name, text)
      if "caption" not in record:
        continue
      truths.setdefault(name, []).extend(sources.captions(record))
      is_right = text in caption_generator.true_captions(
        record, self._split.example
      )
      right.append(is_right)
      if len(cells) < self._number:
        cells.append(self._cell(record, text, is_right))
    if jax.process_index() == 0:
      rows = [{"image_id": k, "caption": v} for k, v in captions.items()]
      files.write_json(self._results, rows)
      if cells:
        contact_sheet.contact_sheet(cells, self._sheet)
    references = self._references or truths
    if references:
      yield from scores.score(captions, references).total.items()
    if right:
      yield "caption_exact", 100.0 * float(np.mean(right))

  def _cell(
    self, record: sources.Record, text: str, is_right: bool
  ) -> contact_sheet.Cell:
    lines = (
      contact_sheet.Line("true", sources.captions(record)[0]),
      contact_sheet.Line("written", text, is_right),
    )
    picture = transforms.decode(record["image"], self._split.example.max_pixels)
    return contact_sheet.Cell(picture, lines)


def _names(records: Iterable[sources.Record]) -> list[int | str]:
  """What pictures are called in results: as their annotation says, else by
  their files' names, where no two files have the same."""
  known = [_Known.of(record) for record in records]
  paths = {one.path for one in known}
  short = len({os.path.basename(path) for path in paths}) == len(paths)
  return [
    one.image_id
    if one.image_id is not None
    else (os.path.basename(one.path) if short else one.path)
    for one in known
  ]


class _Known(NamedTuple):
  """Of a record, without its picture."""

  image_id: int | str | None
  path: str

  @classmethod
  def of(cls, record: sources.Record) -> "_Known":
    image = record["image"]
    path = image if isinstance(image, str) else record["id"]
    return cls(sources.image_id(record), path)
