"""Generated captions of a split: scored, and saved in COCO's result format."""

import os
from collections.abc import Iterator

import jax
import numpy as np

from blip_jax.data import datasets, sources
from blip_jax.evaluators import (
  base,
  caption_generator,
  held_out_loss,
  result_file,
)
from blip_jax.evaluators import references as human_captions
from blip_jax.evaluators.scores import caption_metrics as scores
from blip_jax.evaluators.scores import image_names
from blip_jax.models import decoding
from blip_jax.runtime import (
  contact_sheet,
  files,
  train_state,
)
from blip_jax.tasks import base as tasks


def build(context: base.Context) -> list[base.Evaluator]:
  """Returns evaluators of the held-out loss and of generated captions; of
  videos, of the captions alone, without a contact sheet."""
  settings = context.settings
  # The captions of NoCaps are secret: only its server can score.
  has_captions = settings.references != "none"
  open_rows = datasets.open_source if has_captions else datasets.open_images
  split = context.split(open_rows(settings.source, settings.image_root))
  references = None
  if has_captions and settings.references:
    references = human_captions.read(settings.references)
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
    0 if settings.num_frames else settings.samples,
    settings.num_frames,
  )
  if not has_captions or settings.num_frames:
    return [generated]
  return [held_out_loss.HeldOutLoss(split, context.task), generated]


class Captions:
  """Generates a caption of every image of a split, and scores them.

  An image counts once, with the captions of all its rows as references.
  `caption_exact` is the percentage of captions that are exactly right; see
  `caption_generator.is_right`.

  Args:
    split: images; nothing is scored if the records have no captions.
    task: with the predict function `caption`.
    settings: how to decode.
    references: human captions; by default those of the records.
    results: JSON file for the captions, a list of {image_id, caption} with each
      image once, and the path of the `image` where that is known.
    sheet: contact sheet.
    num_shown: images on the contact sheet; 0 draws none.
    num_frames: sampled from each video; 0: the split has images.
  """

  def __init__(
    self,
    split: base.Split,
    task: tasks.Task,
    settings: decoding.Decoding,
    references: human_captions.References | None,
    results: result_file.ResultFile,
    sheet: result_file.ResultFile,
    num_shown: int,
    num_frames: int = 0,
  ):
    self._split = split.by_image
    self._references = references
    self._results = results
    self._sheet = sheet
    self._num_shown = num_shown
    self._generate = caption_generator.CaptionGenerator(
      self._split, task, settings, split.example.prompt, num_frames
    )

  def run(self, state: train_state.TrainState) -> Iterator[tuple[str, float]]:
    texts, valid = self._generate(state.params)
    rows = np.flatnonzero(valid).tolist()
    origins, paths, truths, right = [], [], [], []
    for row in rows:
      record = self._split.source[row]
      paths.append(_path(record))
      origins.append(human_captions.origin(record))
      if "caption" in record:
        truths.append(human_captions.texts(record))
        right.append(
          caption_generator.is_right(texts[row], record, self._split.example)
        )
    names = image_names.of_images(origins)
    captions = {name: texts[row] for name, row in zip(names, rows, strict=True)}
    if jax.process_index() == 0:
      results = [
        {"image_id": name} | path | {"caption": captions[name]}
        for name, path in zip(names, paths, strict=True)
      ]
      with self._results.writing() as path:
        files.write_json(path, results)
    if not truths:
      return
    human = dict(zip(names, truths, strict=True))
    if self._references:
      human = {
        names[n]: others for n, others in self._references.of(origins).items()
      }
    scored = scores.score(captions, human)
    if jax.process_index() == 0 and self._num_shown:
      cells = [
        self._cell(row, texts[row], is_right, scored.per_image[name]["ROUGE_L"])
        for row, is_right, name in zip(
          rows[: self._num_shown], right, names, strict=False
        )
      ]
      with self._sheet.writing() as path:
        contact_sheet.contact_sheet(cells, path)
    yield from scored.total.items()
    yield "caption_exact", 100.0 * float(np.mean(right))

  def _cell(
    self, row: int, text: str, is_right: bool, rouge_l: float
  ) -> contact_sheet.Cell:
    record = self._split.source[row]
    lines = (
      contact_sheet.Line("true", human_captions.texts(record)[0]),
      caption_generator.line(text, record, is_right, rouge_l),
    )
    return contact_sheet.Cell(caption_generator.thumbnail(record), lines)


def _path(record: sources.Record) -> dict[str, str]:
  """The path of an image, for its result; COCO's says no more than the id."""
  path = files.printable(sources.image_path(record))
  coco_id = sources.coco_image_id(path)
  if not path or (coco_id and coco_id == sources.image_id(record)):
    return {}
  return {"image": os.path.normpath(path)}
