"""The command-line tool that scores captions."""

import json
import subprocess
import sys

import pytest
from blip_jax.tools import score_captions


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
  assert shown.err.startswith("score_captions: The references have no caption")
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
