"""The tool that holds this package against the original, held to its word."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from blip_jax.convert import reader, tensor_files
from tests import helpers
from tests.parity import __main__ as check_parity

ROOT = pathlib.Path(__file__).resolve().parent.parent

GOLDEN = helpers.GOLDEN


def run(capsys, *args):
  """Exit code, and the lines of the table by verdict."""
  code = check_parity.main([str(arg) for arg in args])
  lines = capsys.readouterr().out.splitlines()
  verdicts = {
    verdict: [line for line in lines if f"  {verdict}" in line]
    for verdict in ("ok", "FAIL", "missing")
  }
  assert lines[-1] == ", ".join(
    f"{len(found)} {verdict}" for verdict, found in verdicts.items()
  )
  return code, verdicts


@pytest.fixture
def folder(tmp_path):
  """A copy with the image tower's case alone."""
  manifest = json.loads((GOLDEN / "manifest.json").read_text())
  manifest["cases"] = [c for c in manifest["cases"] if c["name"] == "vit"]
  for name in ("ckpt/vit.pth", "data/vit.npz", "tokenizer/tiny/vocab.txt"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDEN / name, tmp_path / name)
  (tmp_path / "manifest.json").write_text(json.dumps(manifest))
  return tmp_path


def assert_holds(capsys, *args):
  """Nothing fails, and nothing is missing but what ranks answers."""
  code, verdicts = run(capsys, *args, "--allow-missing")
  assert not verdicts["FAIL"]
  assert code == 0
  waiting = ("answer_list", "rank", "ties", "fact ", "tokenizer/")
  for line in verdicts["missing"]:
    assert line.split(maxsplit=1)[1].startswith(waiting), line


@pytest.mark.parametrize(
  "case",
  [
    "lr_schedules",
    "tokenizer_tiny",
    "image_preprocess",
    "randaugment",
    "blip_base",
    "blip_nlvr_deep",
  ],
)
def test_cases_without_tests_of_their_own_hold(capsys, case):
  """Of the others, test_vit, test_med, test_generation and test_pretrain say
  more; below they are all run."""
  assert_holds(capsys, GOLDEN, "--case", case)


@pytest.mark.slow
def test_all_that_is_committed_holds(capsys):
  assert_holds(capsys, GOLDEN)


@pytest.mark.slow
def test_all_shared_goldens_hold(capsys, shared_dir):
  code, verdicts = run(
    capsys,
    shared_dir / "goldens",
    "--allow-missing",
    f"--vocab={shared_dir / 'vocab' / 'bert-base-uncased'}",
  )
  assert code == 0 and len(verdicts["ok"]) > 300


def test_a_whole_case_needs_no_allowance(capsys, folder):
  code, verdicts = run(capsys, folder)
  assert code == 0 and not verdicts["missing"]


def test_what_nobody_looks_at_is_missing(capsys, folder):
  """An array more than any check knows of, and weights of no case."""
  with np.load(folder / "data" / "vit.npz") as data:
    np.savez(folder / "data" / "vit.npz", more=np.zeros(3), **data)
  shutil.copy(folder / "ckpt" / "vit.pth", folder / "ckpt" / "other.pth")
  code, verdicts = run(capsys, folder)
  assert code == 1
  more, other = verdicts["missing"]
  assert more.split()[:2] == ["vit", "more"]
  assert other.split()[:2] == ["folder", "ckpt/other.pth"]
  assert run(capsys, folder, "--allow-missing")[0] == 0


def test_a_wrong_weight_fails(capsys, folder):
  path = folder / "ckpt" / "vit.pth"
  state = dict(reader.read(path))
  name = "blocks.1.mlp.fc1.bias"
  state[name] = state[name] * np.float32(1.01)
  tensor_files.save_torch(path, state)
  code, verdicts = run(capsys, folder)
  assert code == 1
  failed = {line.split()[1] for line in verdicts["FAIL"]}
  # What comes before the weight is as it was.
  assert {"features", "block1"} <= failed and "block0" not in failed


def test_a_wrong_golden_fails(capsys, folder):
  with np.load(folder / "data" / "vit.npz") as data:
    arrays = dict(data)
  arrays["grad_probe"][3] += 0.01
  np.savez(folder / "data" / "vit.npz", **arrays)
  code, verdicts = run(capsys, folder)
  assert code == 1
  (line,) = verdicts["FAIL"]
  assert line.split()[1] == "grad_probe"


def test_a_broken_case_fails_and_the_others_go_on(capsys, folder):
  manifest = json.loads((folder / "manifest.json").read_text())
  broken = {**manifest["cases"][0], "checkpoints": ["ckpt/nothing.pth"]}
  manifest["cases"].append({"name": "lr_schedules", "checkpoints": []})
  manifest["cases"][0] = broken
  (folder / "manifest.json").write_text(json.dumps(manifest))
  code, verdicts = run(capsys, folder)
  assert code == 1
  (line,) = verdicts["FAIL"]
  assert "ckpt/nothing.pth" in line


@pytest.mark.parametrize("case", ["unheard_of", "blip_vqa"])
def test_an_unknown_case_is_a_failure(capsys, folder, case):
  code, verdicts = run(capsys, folder, "--case", case, "--allow-missing")
  assert code == 1 and len(verdicts["FAIL"]) == 1
  manifest = json.loads((folder / "manifest.json").read_text())
  manifest["cases"].append({"name": "unheard_of", "checkpoints": []})
  (folder / "manifest.json").write_text(json.dumps(manifest))
  code, verdicts = run(capsys, folder, "--allow-missing")
  assert code == 1 and "knows no such case" in verdicts["FAIL"][0]


def test_a_folder_without_goldens(capsys, tmp_path):
  assert check_parity.main([str(tmp_path)]) == 1
  assert "no manifest.json" in capsys.readouterr().err
