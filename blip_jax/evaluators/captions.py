"""Generated captions of a split: scored, and saved in COCO's result format."""

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


def build(context: base.Context) -> list[base.Evaluator]:
  """Returns evaluators of the held-out loss and of generated captions."""
  settings = context.settings
  # The captions of NoCaps are secret: only its server can score.
  has_captions = settings.references != "none"
  open_rows = datasets.open_source if has_captions else datasets.open_images
  split = context.split(open_rows(settings.source, settings.image_root))
  references = None
  if has_captions and settings.references:
    references = caption_files.read_references(settings.references)
  prompt_ids = split.example.tokenizer.prompt_ids(split.example.prompt)
  generated = Captions(
    split,
    context.task,
    decoding.make(
      context.config.generation.to_dict(),
      len(prompt_ids),
      context.task.model.config.med.max_positions,
    ),
    references,
    context.file(f"{context.name}_captions.json"),
    context.file("samples.png"),
    settings.samples,
  )
  if not has_captions:
    return [generated]
  return [held_out_loss.HeldOutLoss(split, context.task), generated]


class Captions:
  """Generates a caption of every image of a split, and scores them.

  `caption_exact` is the percentage of captions that are exactly right; see
  `caption_generator.true_captions`.

  Args:
    split: images; nothing is scored if the records have no captions.
    task: with the predict function `caption`.
    settings: how to decode.
    references: human captions by `image_id`; by default those of the records.
    results: path of the JSON file for the captions, a list of {image_id,
      caption} with each image once.
    sheet: path of the contact sheet.
    num_shown: images on the contact sheet; 0 draws none.
  """

  def __init__(
    self,
    split: base.Split,
    task: tasks.Task,
    settings: decoding.Decoding,
    references: Mapping[Any, Sequence[str]] | None,
    results: str | os.PathLike,
    sheet: str | os.PathLike,
    num_shown: int,
  ):
    self._split = split
    self._references = references
    self._results = results
    self._sheet = sheet
    self._num_shown = num_shown
    self._generate = caption_generator.CaptionGenerator(
      split, task, settings, split.example.prompt
    )

  def run(self, state: train_state.TrainState) -> Iterator[tuple[str, float]]:
    texts, valid = self._generate(state.params)
    rows = np.flatnonzero(valid).tolist()
    records = self._split.source
    names = _image_names(records[row] for row in rows)
    captions, truths, right, cells = {}, {}, [], []
    for row, name in zip(rows, names, strict=True):
      text = texts[row]
      record = records[row]
      captions.setdefault(name, text)
      if "caption" not in record:
        continue
      truths.setdefault(name, []).extend(sources.captions(record))
      is_right = text in caption_generator.true_captions(
        record, self._split.example
      )
      right.append(is_right)
      if len(cells) < self._num_shown:
        cells.append(self._cell(record, text, is_right))
    if jax.process_index() == 0:
      results = [{"image_id": k, "caption": v} for k, v in captions.items()]
      files.write_json(self._results, results)
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
      contact_sheet.Line("true", caption_generator.first_caption(record)),
      contact_sheet.Line("generated", text, is_right),
    )
    image = transforms.decode(record["image"], self._split.example.max_pixels)
    return contact_sheet.Cell(image, lines)


def _image_names(records: Iterable[sources.Record]) -> list[int | str]:
  """Names of images in the results: `image_id` if the record has one, else the
  name of the file, or its path if two files have the same name."""
  names = [_ImageName.from_record(record) for record in records]
  paths = {name.path for name in names}
  unique = len({os.path.basename(path) for path in paths}) == len(paths)
  return [
    name.image_id
    if name.image_id is not None
    else (os.path.basename(name.path) if unique else name.path)
    for name in names
  ]


class _ImageName(NamedTuple):
  """What identifies an image; keeps no pixels in memory."""

  image_id: int | str | None
  path: str

  @classmethod
  def from_record(cls, record: sources.Record) -> "_ImageName":
    image = record["image"]
    path = image if isinstance(image, str) else record["id"]
    return cls(sources.image_id(record), path)
