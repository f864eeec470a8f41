"""Samples: the contact sheet, and captions that are printed."""

import pytest

from blip_jax.evaluators import ranking, samples
from blip_jax.evaluators.result_file import ResultFile
from blip_jax.runtime import contact_sheet
from tests.colour_task import ColourImages, ColourTask, colour_split, evaluate


def test_unreadable_images_are_not_shown(tmp_path, capsys):
  split = colour_split(ColourImages(bad=(0,)))
  ranker = ranking.Ranking(split, ColourTask())
  path = tmp_path / "samples.png"
  sheet = samples.Samples(split, ColourTask(), ranker, 3, ResultFile(path))
  assert evaluate(sheet) == {"caption_exact": 100.0}
  assert path.exists()
  printed = capsys.readouterr().out
  assert "true:      green" in printed and "generated: green" in printed
  assert "red" not in printed


def test_the_sheet_labels_its_lines(tmp_path, monkeypatch):
  sheets = []
  monkeypatch.setattr(
    contact_sheet, "contact_sheet", lambda cells, path: sheets.append(cells)
  )
  split = colour_split(ColourImages())
  ranker = ranking.Ranking(split, ColourTask())
  evaluator = samples.Samples(
    split, ColourTask(), ranker, 3, ResultFile(tmp_path / "samples.png")
  )
  evaluate(evaluator)
  ((*_, last),) = sheets
  assert len(sheets[0]) == 3
  assert [tuple(line) for line in last.lines] == [
    ("true", "blue", None),
    ("top-ranked", "blue", True),
    ("generated", "blue", True),
  ]


def test_five_captions_are_printed_and_all_are_compared(tmp_path, capsys):
  source = ColourImages()
  source[6]["caption"] = ["nothing"]
  split = colour_split(source, batch_size=8)
  ranker = ranking.Ranking(split, ColourTask())
  sheet = samples.Samples(
    split, ColourTask(), ranker, 1, ResultFile(tmp_path / "a.png")
  )
  assert evaluate(sheet) == {"caption_exact": pytest.approx(600 / 7)}
  printed = capsys.readouterr().out
  assert printed.count("true:") == printed.count("generated:") == 5
  assert "black" in printed and "pink" not in printed
