"""Samples: the contact sheet, and captions that are printed."""

from blip_jax.evaluators import ranking, samples
from blip_jax.runtime import contact_sheet
from tests.colour_task import ColourImages, ColourTask, colour_split, evaluate


def test_unreadable_images_are_not_shown(tmp_path, capsys):
  split = colour_split(ColourImages(bad=(0,)))
  ranker = ranking.Ranking(split, ColourTask())
  path = tmp_path / "samples.png"
  sheet = samples.Samples(split, ColourTask(), ranker, 3, path)
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
    split, ColourTask(), ranker, 3, tmp_path / "samples.png"
  )
  evaluate(evaluator)
  ((*_, last),) = sheets
  assert len(sheets[0]) == 3
  assert [tuple(line) for line in last.lines] == [
    ("true", "blue", None),
    ("top-ranked", "blue", True),
    ("generated", "blue", True),
  ]
