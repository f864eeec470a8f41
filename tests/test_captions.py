"""Generated captions of a split: scores, results, and names of images."""

import json

import numpy as np
import pytest
from PIL import Image

from blip_jax import defaults
from blip_jax.evaluators import captions as captions_lib
from blip_jax.evaluators import held_out_loss, references
from blip_jax.evaluators.result_file import ResultFile
from blip_jax.evaluators.scores.image_names import Image as ImageName
from blip_jax.models import decoding
from blip_jax.runtime import contact_sheet
from blip_jax.tasks import caption
from tests import helpers
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
    ResultFile(path),
    ResultFile(tmp_path / "sheet.png"),
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
  others = references.References(
    [ImageName(None, f"images:{i}") for i in range(7)], [["nothing"]] * 7, []
  )
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


def test_a_free_caption_has_a_score_and_is_not_wrong(tmp_path, monkeypatch):
  """Photographs can be described in more ways than their references."""
  sheets = []
  monkeypatch.setattr(
    contact_sheet, "contact_sheet", lambda cells, path: sheets.append(cells)
  )
  source = ColourImages()
  source[0]["caption"] = ["a red"]
  source[1]["caption"] = ["nothing of it"]
  run_captions(colour_split(source), tmp_path)
  # All true captions of a rendered scene: no other can be right.
  source[1]["references"] = ["nothing of it"]
  run_captions(colour_split(source), tmp_path)
  free, complete = [[tuple(x.lines[1]) for x in cells] for cells in sheets]
  # One of two words, precision 1: 2.44 * 0.5 / (0.5 + 1.44) = 0.63.
  assert free == [
    ("generated, ROUGE-L 0.63", "red", None),
    ("generated, ROUGE-L 0.00", "green", None),
  ]
  assert complete == [free[0], ("generated", "green", False)]


def flat_rows(source, order):
  """A row for each caption, in this order of (row, caption)."""
  return [
    {**source[row], "caption": source[row]["caption"][n], "id": f"{row}#{n}"}
    for row, n in order
  ]


INTERLEAVED = [(row, n) for n in range(2) for row in range(7)]


@pytest.mark.parametrize("with_id", [True, False])
@pytest.mark.parametrize("order", [sorted(INTERLEAVED), INTERLEAVED])
def test_rows_of_one_image_are_one_image(tmp_path, order, with_id):
  """The model is right about the first of two captions of each image; one
  image has another caption."""
  source = ColourImages(captions=2)
  source[3]["caption"] = ["nothing", "a thing that is red"]
  for row, record in enumerate(source):
    if with_id:
      record["image_id"] = row
  listed, rows = run_captions(colour_split(source), tmp_path)
  flat, flat_results = run_captions(
    colour_split(flat_rows(source, order)), tmp_path
  )
  assert flat == listed
  assert flat["caption_exact"] == pytest.approx(600 / 7)
  assert [row["caption"] for row in flat_results] == [*COLOURS]
  assert len(rows) == 7
  if with_id:
    assert flat_results == rows


def test_captions_of_shards_are_bytes(tmp_path):
  source = ColourImages()
  for row, record in enumerate(source):
    record["caption"] = record["caption"][0].encode()
    record["id"] = f"00000.tar:COCO_val2014_{row:012d}"
  scores, rows = run_captions(colour_split(source), tmp_path)
  assert [row["image_id"] for row in rows] == [*range(7)]
  assert scores["caption_exact"] == 100 and scores["Bleu_1"] == pytest.approx(1)


def build(tmp_path, rows, references, task=None, num_frames=0):
  """The evaluators of a list of colours, as a run builds them."""
  split = colour_split(ColourImages())
  for colour, record in zip(COLOURS, split.source, strict=True):
    Image.fromarray(np.asarray(record["image"])).save(
      tmp_path / f"{colour}.png"
    )
  (tmp_path / "val.json").write_text(json.dumps(rows))
  settings = defaults.captioned_split(str(tmp_path / "val.json"))
  settings.image_root = str(tmp_path)
  settings.references = references
  settings.samples, settings.num_frames = 2, num_frames
  config = caption.defaults()
  config.evals.batch_size = 4
  return captions_lib.build(
    captions_lib.base.Context(
      "val",
      settings,
      config,
      task or ColourTask(),
      split.example,
      split.mesh,
      split.bad_samples,
      str(tmp_path),
    )
  )


ROWS = [{"image": f"{c}.png", "caption": c} for c in COLOURS]


def test_a_split_is_scored_by_its_own_captions(tmp_path):
  loss, generated = build(tmp_path, ROWS, "")
  assert isinstance(loss, held_out_loss.HeldOutLoss)
  scores = evaluate(generated)
  assert scores["caption_exact"] == 100 and scores["Bleu_1"] == pytest.approx(1)
  rows = json.loads((tmp_path / "val_captions.json").read_text())
  assert [row["caption"] for row in rows] == [*COLOURS]
  assert (tmp_path / "samples.png").exists()


def test_videos_are_captioned_by_their_frames(tmp_path):
  """There is no loss and no contact sheet of them."""
  rows = []
  for colour, record in zip(COLOURS, ColourImages(), strict=True):
    image = record["image"]
    frames = np.stack([np.zeros_like(image), np.zeros_like(image), image])
    helpers.write_video(tmp_path / f"{colour}.mkv", frames)
    rows.append({"video": f"{colour}.mkv", "caption": [colour, "a video"]})
  (tmp_path / "black.mkv").write_text("no video")
  of_image = ColourTask.predict_fns["caption"]
  by_last = lambda params, image, *how: of_image(params, image[:, 2], *how)
  task = ColourTask(caption=by_last)
  (generated,) = build(tmp_path, rows, "", task, num_frames=3)
  assert evaluate(generated)["caption_exact"] == 100
  found = json.loads((tmp_path / "val_captions.json").read_text())
  expected = [colour for colour in COLOURS if colour != "black"]
  assert [row["caption"] for row in found] == expected
  assert not (tmp_path / "samples.png").exists()


def test_a_split_is_scored_by_captions_of_another_file(tmp_path):
  others = [row | {"caption": "nothing"} for row in ROWS]
  (tmp_path / "others.json").write_text(json.dumps(others))
  _, generated = build(tmp_path, ROWS, str(tmp_path / "others.json"))
  scores = evaluate(generated)
  assert scores["Bleu_1"] < 1e-6 and scores["caption_exact"] == 100


def test_the_number_of_a_file_is_not_compared_with_an_id(tmp_path):
  """The split has no ids; those of the references are numbers of its other
  images."""
  split = colour_split(ColourImages())
  rows, others = [], []
  for n, (colour, record) in enumerate(zip(COLOURS, split.source, strict=True)):
    Image.fromarray(np.asarray(record["image"])).save(tmp_path / f"{n}.png")
    rows.append({"image": f"{n}.png", "caption": colour})
    others.append(rows[-1] | {"image_id": n + 1})
  (tmp_path / "others.json").write_text(json.dumps(others))
  _, generated = build(tmp_path, rows[1:6], str(tmp_path / "others.json"))
  assert evaluate(generated)["Bleu_1"] == pytest.approx(1)
  # COCO's format has the number; the path says that it is none of an id.
  results = json.loads((tmp_path / "val_captions.json").read_text())
  assert results[0] == {
    "image_id": 1,
    "image": f"{tmp_path}/1.png",
    "caption": COLOURS[1],
  }


def test_a_split_without_captions_is_only_captioned(tmp_path):
  rows = [{"image": row["image"]} for row in ROWS]
  (generated,) = build(tmp_path, rows, "none")
  assert evaluate(generated) == {}
  rows = json.loads((tmp_path / "val_captions.json").read_text())
  assert [row["caption"] for row in rows] == [*COLOURS]
  assert not (tmp_path / "samples.png").exists()
