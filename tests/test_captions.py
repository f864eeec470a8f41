"""Generated captions of a split: scores, results, and names of images."""

import json

import pytest

from blip_jax.evaluators import captions as captions_lib
from blip_jax.models import decoding
from blip_jax.runtime import contact_sheet
from tests.colour_task import (
  COLOURS,
  ColourImages,
  ColourTask,
  colour_split,
  evaluate,
)


def run_captions(split, tmp_path, references=None):
  settings = decoding.Decoding(6, 0, num_beams=1)
  path = tmp_path / "captions.json"
  evaluator = captions_lib.Captions(
    split,
    ColourTask(),
    settings,
    references,
    path,
    tmp_path / "sheet.png",
    2,
  )
  return evaluate(evaluator), json.loads(path.read_text())


def test_captions_are_saved_and_scored(tmp_path):
  scores, rows = run_captions(colour_split(ColourImages(bad=(0,))), tmp_path)
  assert rows == [
    {"image_id": f"images:{i}", "caption": COLOURS[i]} for i in range(1, 7)
  ]
  assert scores["caption_exact"] == 100 and scores["Bleu_1"] == pytest.approx(1)
  assert (tmp_path / "sheet.png").exists()
  # Other references replace the captions of the records.
  others = {f"images:{i}": ["nothing"] for i in range(7)}
  scores, _ = run_captions(colour_split(ColourImages()), tmp_path, others)
  assert scores["caption_exact"] == 100 and scores["Bleu_1"] < 1e-6


def test_an_image_is_in_the_results_once(tmp_path):
  """Under its `image_id`, or the name of its file."""

  class Rows(ColourImages):
    def __getitem__(self, row):
      record = {**super().__getitem__(row), "image_id": row // 2}
      if row == 6:
        del record["image_id"]
      return record

  _, rows = run_captions(colour_split(Rows()), tmp_path)
  assert [row["image_id"] for row in rows] == [0, 1, 2, "images:6"]


def test_images_without_captions_are_not_scored(tmp_path):
  class Rows(ColourImages):
    def __getitem__(self, row):
      record = dict(super().__getitem__(row))
      del record["caption"]
      return record

  scores, rows = run_captions(colour_split(Rows()), tmp_path)
  assert not scores and len(rows) == 7


def test_the_sheet_labels_true_and_generated_captions(tmp_path, monkeypatch):
  sheets = []
  monkeypatch.setattr(
    contact_sheet, "contact_sheet", lambda cells, path: sheets.append(cells)
  )
  run_captions(colour_split(ColourImages()), tmp_path)
  ((first, second),) = sheets
  assert [line.label for line in first.lines] == ["true", "generated"]
  assert [line.text for line in second.lines] == ["green", "green"]
  assert second.lines[1].right
