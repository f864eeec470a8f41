"""The command-line tool that scores captions."""

import json
import subprocess
import sys

import numpy as np
import pytest
from blip_jax.tools import score_captions
from PIL import Image

from blip_jax.data import datasets, scenes
from blip_jax.evaluators import captions
from blip_jax.evaluators.result_file import ResultFile
from blip_jax.inference import line_job, stamps
from blip_jax.models import decoding
from tests.colour_task import COLOURS, ColourTask, colour_split, evaluate


@pytest.fixture(scope="module")
def tool():
  return score_captions


@pytest.fixture
def files(tmp_path):
  """Arguments: results of two images, references of three."""
  results = [
    {"image_id": 3, "caption": "Two cats"},
    {"image_id": 7, "caption": "a dog runs on wet sand"},
  ]
  references = [
    {"image": "val/COCO_val2014_000000000003.jpg", "caption": ["Two cats."]},
    {"image": "val/COCO_val2014_000000000005.jpg", "caption": ["A bus."]},
    {"image": "val/COCO_val2014_000000000007.jpg", "caption": "A dog, dry."},
  ]
  (tmp_path / "r.json").write_text(json.dumps(results))
  (tmp_path / "a.json").write_text(json.dumps(references))
  return [
    *("--results", f"{tmp_path}/r.json"),
    *("--references", f"{tmp_path}/a.json"),
  ]


def test_the_table_and_the_number_of_images_not_scored(tool, files, capsys):
  assert tool.main(files) == 0
  head, *rows, scored, left = capsys.readouterr().out.splitlines()
  assert head.split() == ["metric", "score"]
  names, values = zip(*(row.split() for row in rows), strict=True)
  assert names == ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr")
  # 4 of 8 words are right, and nothing is too short.
  assert values[0] == "0.5000"
  assert scored == "2 images were scored."
  assert left.startswith("1 of the 3 images with references have no result")


def test_the_files_have_the_scores_of_the_table(tool, files, tmp_path, capsys):
  out, each = tmp_path / "s.json", tmp_path / "p.json"
  assert tool.main([*files, "--out", f"{out}", "--per-image", f"{each}"]) == 0
  shown = [line.split() for line in capsys.readouterr().out.splitlines()[1:7]]
  total = json.loads(out.read_text())
  assert [[name, f"{value:.4f}"] for name, value in total.items()] == shown
  rows = json.loads(each.read_text())
  assert [row["image_id"] for row in rows] == [3, 7]
  assert all(list(row)[1:] == list(total) for row in rows)
  mean = (rows[0]["CIDEr"] + rows[1]["CIDEr"]) / 2
  assert total["CIDEr"] == pytest.approx(mean)


def test_no_note_if_all_images_were_scored(tool, files, tmp_path, capsys):
  path = tmp_path / "a.json"
  rows = json.loads(path.read_text())
  path.write_text(json.dumps([rows[0], rows[2]]))
  assert tool.main(files) == 0
  assert capsys.readouterr().out.endswith("2 images were scored.\n")


def test_errors_are_one_line(tool, files, tmp_path, capsys):
  (tmp_path / "a.json").write_text("[]")
  assert tool.main([*files, "--out", f"{tmp_path}/s.json"]) == 1
  shown = capsys.readouterr()
  assert not shown.out and shown.err.count("\n") == 1
  assert shown.err.startswith(f"error: {tmp_path}/a.json: expected a JSON list")
  assert not (tmp_path / "s.json").exists()


def test_unknown_metrics_are_refused(tool, files, capsys):
  with pytest.raises(SystemExit):
    tool.main([*files, "--java", "BLEURT"])
  assert "METEOR" in capsys.readouterr().err


def test_the_script_runs(root, files):
  done = subprocess.run(
    [sys.executable, root / "tools" / "score_captions.py", *files],
    env={"PYTHONPATH": str(root)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert "CIDEr" in done.stdout


@pytest.fixture(params=["image_id", "path"])
def split(request, tmp_path):
  """A split with a row per caption, of images with names of every kind, and
  the rows that a data source reads."""
  images = [
    "0.png",
    "1000092795.jpg",
    "dog.jpg",
    "sub/dog.jpg",
    "img_00042.jpg",
  ]
  colours = COLOURS[: len(images)]
  rows = [
    {"image": image, "caption": f"{word} {colour}"}
    for word in ("a", "the")
    for image, colour in zip(images, colours, strict=True)
  ]
  if request.param == "image_id":
    for n, row in enumerate(rows):
      # Not the numbers in the names of files.
      row["image_id"] = str((n + 1) % 5)
  (tmp_path / "p" / "sub").mkdir(parents=True)
  for image, colour in zip(images, colours, strict=True):
    pixels = np.full((8, 8, 3), scenes.COLOURS[colour], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p" / image, "png")
  path = tmp_path / "val.json"
  path.write_text(json.dumps(rows))
  return path


def test_a_run_is_scored_by_the_split_that_it_captioned(tool, split, tmp_path):
  """The scores are those of the run, whatever the images are called."""
  source = datasets.open_source(str(split), str(tmp_path / "p"))
  results = tmp_path / "val_captions.json"
  evaluator = captions.Captions(
    colour_split(source),
    ColourTask(),
    decoding.Decoding(6, 0, num_beams=1),
    None,
    ResultFile(results),
    ResultFile(tmp_path / "samples.png"),
    0,
  )
  scores = evaluate(evaluator)
  out = tmp_path / "s.json"
  arguments = ["--results", str(results), "--references", str(split)]
  assert tool.main([*arguments, "--out", str(out)]) == 0
  exact = scores.pop("caption_exact")
  assert exact == 0 and scores["CIDEr"] > 0
  assert json.loads(out.read_text()) == pytest.approx(scores)


def test_the_caption_job_is_scored_by_the_list_that_it_captioned(
  tool, split, tmp_path
):
  """A list, whose ids are numbers of rows, and the folder of its images."""
  outputs = []
  for images in (str(split), str(tmp_path / "p")):
    source = datasets.open_images(images, str(tmp_path / "p"))
    known = stamps.Stamps(source)
    lines = [
      {"row": row, "id": record["id"]}
      | line_job._note(record, known)
      | {"caption": "a red dog"}
      for row, record in enumerate(source)
    ]
    results, out = tmp_path / "captions.jsonl", tmp_path / "s.json"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--results", str(results), "--references", str(split)]
    assert tool.main([*arguments, "--out", str(out)]) == 0
    outputs.append(json.loads(out.read_text()))
  assert all(output == outputs[0] for output in outputs)
  # Of fifteen words, "a" is right for every image, and one of them is red.
  assert outputs[0]["Bleu_1"] == pytest.approx(6 / 15)


@pytest.fixture
def by_number(tmp_path):
  """Writes rows of some images, where image n is n.png and has the id n + 1."""

  def write(name, numbers, *keys):
    rows = []
    for n in numbers:
      row = {"image": f"{n}.png", "image_id": n + 1, "image_id=number": n}
      names = {key.partition("=")[0]: row[key] for key in keys}
      rows.append(names | {"caption": f"a {COLOURS[n]} thing number {n}"})
    (tmp_path / name).write_text(json.dumps(rows))
    return str(tmp_path / name)

  return write


@pytest.mark.parametrize("references", [("image",), ("image", "image_id")])
@pytest.mark.parametrize(
  "results", [("image",), ("image", "image_id"), ("image", "image_id=number")]
)
def test_captions_are_scored_by_those_of_the_same_image(
  tool, by_number, tmp_path, results, references
):
  out = tmp_path / "s.json"
  arguments = [
    *("--results", by_number("r.json", (1, 2, 4), *results)),
    *("--references", by_number("h.json", range(7), *references)),
    *("--out", str(out)),
  ]
  assert tool.main(arguments) == 0
  assert json.loads(out.read_text())["Bleu_4"] == pytest.approx(1)


def test_ids_that_may_be_numbers_of_files_need_a_choice(
  tool, by_number, tmp_path, capsys
):
  out = tmp_path / "s.json"
  arguments = [
    *("--results", by_number("r.json", (1, 2, 4), "image_id")),
    *("--references", by_number("h.json", range(7), "image", "image_id")),
    *("--out", str(out)),
  ]
  assert tool.main(arguments) == 1
  assert "--by image_id" in capsys.readouterr().err
  scores = []
  for by in ("image_id", "path"):
    assert tool.main([*arguments, "--by", by]) == 0
    scores.append(json.loads(out.read_text())["Bleu_4"])
  assert scores[0] == pytest.approx(1) and scores[1] < 0.9


def test_references_that_cannot_be_used_are_counted(
  tool, files, tmp_path, capsys
):
  path = tmp_path / "a.json"
  rows = json.loads(path.read_text())
  rows[0]["caption"] += [None, ""]
  path.write_text(json.dumps([*rows, {"image": "9.jpg", "caption": None}]))
  assert tool.main(files) == 0
  last = capsys.readouterr().out.splitlines()[-1]
  assert last.startswith("3 rows or captions of the references cannot be used")
  assert "a.json:0#1: empty_caption" in last
