"""The comparison with the original BLIP: every committed case, and failures."""

import itertools
import json
import shutil

import numpy as np
import pytest

from blip_jax.convert import reader, tensor_files
from tests import helpers
from tests.parity import __main__ as parity
from tests.parity import goldens, models, ties

GOLDEN = helpers.GOLDEN
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
CASES = tuple(case["name"] for case in MANIFEST["cases"])

# The cases of the inner loop (`-m quick`): they compile little.
QUICK = ("lr_schedules", "tokenizer_tiny", "vit")


def run(capsys, *args):
  """Exit code, and the lines of the table by verdict."""
  code = parity.main([str(arg) for arg in args])
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
  """A copy of the goldens with the case `vit` only."""
  manifest = json.loads((GOLDEN / "manifest.json").read_text())
  manifest["cases"] = [c for c in manifest["cases"] if c["name"] == "vit"]
  for name in ("ckpt/vit.pth", "data/vit.npz", "tokenizer/tiny/vocab.txt"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(GOLDEN / name, tmp_path / name)
  (tmp_path / "manifest.json").write_text(json.dumps(manifest))
  return tmp_path


@pytest.mark.parametrize(
  "case",
  [
    pytest.param(case, marks=pytest.mark.quick if case in QUICK else ())
    for case in CASES
  ],
)
def test_every_committed_case_holds(capsys, case):
  """Nothing fails, and nothing is missing."""
  code, verdicts = run(capsys, GOLDEN, "--case", case)
  assert code == 0 and verdicts["ok"], verdicts
  assert not verdicts["missing"]


def test_the_manifest_lists_exactly_the_committed_files():
  cases = MANIFEST["cases"]
  assert len(cases) == 19
  listed = {case["file"] for case in cases}
  listed |= {file for case in cases for file in case["checkpoints"]}
  committed = {
    file.relative_to(GOLDEN).as_posix()
    for folder in ("ckpt", "data")
    for file in (GOLDEN / folder).iterdir()
  }
  assert committed == listed
  files = [file for file in GOLDEN.rglob("*") if file.is_file()]
  assert sum(file.stat().st_size for file in files) <= 16 * 2**20


@pytest.mark.parametrize("case", MANIFEST["cases"], ids=CASES)
def test_the_manifest_lists_exactly_the_arrays_of_a_case(case):
  listed = {
    array["name"]: (array["shape"], array["dtype"]) for array in case["arrays"]
  }
  with np.load(GOLDEN / case["file"]) as data:
    arrays = {
      name: (list(array.shape), str(array.dtype))
      for name, array in data.items()
    }
  assert arrays == listed


def test_committed_goldens_are_the_shared_ones(shared_dir):
  """Bit for bit, but for large gradients that are left out."""
  shared = shared_dir / "goldens"
  manifest = json.loads((shared / "manifest.json").read_text())
  assert manifest["meta"] == MANIFEST["meta"]
  for ours, theirs in zip(MANIFEST["cases"], manifest["cases"], strict=True):
    kept = [array for array in theirs["arrays"] if array in ours["arrays"]]
    files = [x for x in theirs["checkpoints"] if x.endswith(".pth")]
    assert ours == {**theirs, "arrays": kept, "checkpoints": files}
    with (
      np.load(GOLDEN / ours["file"]) as data,
      np.load(shared / ours["file"]) as original,
    ):
      for name in original:
        if name in data:
          assert data[name].tobytes() == original[name].tobytes(), name
        else:
          assert name.startswith("grad."), name
  for file in (GOLDEN / "ckpt").iterdir():
    tensors, original = map(reader.read, (file, shared / "ckpt" / file.name))
    helpers.assert_same(dict(tensors), dict(original))


@pytest.mark.slow
def test_all_shared_goldens_hold(capsys, shared_dir):
  code, verdicts = run(
    capsys,
    shared_dir / "goldens",
    f"--vocab={shared_dir / 'vocab' / 'bert-base-uncased'}",
  )
  assert code == 0 and len(verdicts["ok"]) > 300


def test_a_complete_case_needs_no_allowance(capsys, folder):
  code, verdicts = run(capsys, folder)
  assert code == 0 and not verdicts["missing"]


def test_what_is_not_compared_is_missing(capsys, folder):
  """An array that no check uses, and weights of no case."""
  with np.load(folder / "data" / "vit.npz") as data:
    np.savez(folder / "data" / "vit.npz", more=np.zeros(3), **data)
  shutil.copy(folder / "ckpt" / "vit.pth", folder / "ckpt" / "other.pth")
  code, verdicts = run(capsys, folder)
  assert code == 1
  more, other = verdicts["missing"]
  assert more.split()[:2] == ["vit", "more"]
  assert other.split()[:2] == ["folder", "ckpt/other.pth"]


def test_a_wrong_weight_fails(capsys, folder):
  path = folder / "ckpt" / "vit.pth"
  state = dict(reader.read(path))
  name = "blocks.1.mlp.fc1.bias"
  state[name] = state[name] * np.float32(1.01)
  tensor_files.save_torch(path, state)
  code, verdicts = run(capsys, folder)
  assert code == 1
  failed = {line.split()[1] for line in verdicts["FAIL"]}
  # The layers before that weight are unchanged.
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


def test_a_broken_case_fails_and_the_others_run(capsys, folder):
  manifest = json.loads((folder / "manifest.json").read_text())
  broken = {**manifest["cases"][0], "checkpoints": ["ckpt/nothing.pth"]}
  manifest["cases"].append({"name": "lr_schedules", "checkpoints": []})
  manifest["cases"][0] = broken
  (folder / "manifest.json").write_text(json.dumps(manifest))
  code, verdicts = run(capsys, folder)
  assert code == 1
  (line,) = verdicts["FAIL"]
  assert "ckpt/nothing.pth" in line


@pytest.mark.parametrize("case", ["unknown", "blip_vqa"])
def test_an_unknown_case_is_a_failure(capsys, folder, case):
  code, verdicts = run(capsys, folder, "--case", case)
  assert code == 1 and len(verdicts["FAIL"]) == 1
  manifest = json.loads((folder / "manifest.json").read_text())
  manifest["cases"].append({"name": "unknown", "checkpoints": []})
  (folder / "manifest.json").write_text(json.dumps(manifest))
  code, verdicts = run(capsys, folder)
  assert code == 1 and "has no such case" in verdicts["FAIL"][0]


def test_a_folder_without_goldens(capsys, tmp_path):
  assert parity.main([str(tmp_path)]) == 1
  assert "no manifest.json" in capsys.readouterr().err


def ranks_in_any_order(scores, own):
  """Ranks of the first right candidate, for every order of equal scores."""
  groups = [
    itertools.permutations(np.flatnonzero(scores == value))
    for value in sorted({*scores}, reverse=True)
  ]
  right = {*np.flatnonzero(own)}
  return {
    next(rank for rank, n in enumerate(itertools.chain(*order)) if n in right)
    for order in itertools.product(*groups)
  }


def hits(ranks):
  return tuple(sum(rank < k for rank in ranks) for k in (1, 5, 10))


@pytest.mark.parametrize("seed", range(6))
def test_recall_may_be_that_of_any_order_of_equal_scores(seed):
  """Every number of hits is tried: those that an order gives are reached, and
  no others."""
  rng = np.random.default_rng(seed)
  scores, own = np.zeros((3, 11), np.float32), np.zeros((3, 11), bool)
  for row in range(3):
    sizes = rng.permutation([2, 4, 5])
    scores[row] = rng.permutation(np.repeat([0.5, -100, 0.1], sizes))
    own[row, rng.permutation(11)[: rng.integers(1, 3)]] = True
  ranks = [*map(ranks_in_any_order, scores, own)]
  possible = {hits(one) for one in itertools.product(*ranks)}
  assert len(possible) > 1
  for wanted in itertools.product(range(4), repeat=3):
    ranked = ties.ranked(scores, own, [100 * x / 3 for x in wanted])
    for before, after in zip(scores, ranked, strict=True):
      assert sorted(after) == [*range(11)]
      assert (np.diff(before[after.argsort()]) >= 0).all()
    first = [
      sum(row > row[is_own].max())
      for row, is_own in zip(ranked, own, strict=True)
    ]
    assert hits(first) in possible
    assert (hits(first) == wanted) == (wanted in possible)


def verdict_on_recall(**metrics):
  """The tool's verdict on a golden recall, where the second image and the
  second text rank right and wrong ones equally."""
  metrics = {
    **{
      f"{direction}_r{k}": 100.0
      for direction in ("txt", "img")
      for k in (5, 10)
    },
    **metrics,
  }
  i2t = np.array([[0.9, 0.1, 0.2], [-100, -100, -100]], np.float32)
  t2i = np.array([[0.9, 0.1], [0.5, 0.5], [0.1, 0.2]], np.float32)
  golden = goldens.Golden(None, {"name": "x", "facts": {"recall": metrics}}, {})
  models._compare_recall(golden, "recall", i2t, t2i, {0: 0, 1: 1, 2: 1})
  (check,) = golden.checks
  return check.verdict


def recall_of(txt_r1, img_r1):
  txt, img = (txt_r1 + 200) / 3, (img_r1 + 200) / 3
  return dict(
    txt_r1=txt_r1,
    img_r1=img_r1,
    txt_r_mean=txt,
    img_r_mean=img,
    r_mean=(txt + img) / 2,
  )


@pytest.mark.parametrize("txt_r1", [50.0, 100.0])
@pytest.mark.parametrize("img_r1", [200 / 3, 100.0])
def test_a_golden_recall_of_some_order_holds(txt_r1, img_r1):
  assert verdict_on_recall(**recall_of(txt_r1, img_r1)) == "ok"


@pytest.mark.parametrize(
  "forged",
  [
    recall_of(0.0, 100.0),
    recall_of(75.0, 100.0),
    recall_of(50.0, 100 / 3),
    recall_of(50.0, 250 / 3),
    recall_of(50.0 + 1e-5, 100.0),
    {**recall_of(50.0, 100.0), "txt_r5": 50.0},
    {**recall_of(50.0, 100.0), "r_mean": recall_of(100.0, 100.0)["r_mean"]},
    {**recall_of(50.0, 100.0), "more": 1.0},
  ],
)
def test_a_golden_recall_that_no_order_gives_fails(forged):
  assert verdict_on_recall(**forged) == "FAIL"
