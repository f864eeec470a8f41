"""METEOR and SPICE: refusals, how they are called, and live if installed."""

import importlib
import importlib.util
import json
import math
import shutil
import sys
import urllib.error

import numpy as np
import pytest

from blip_jax.evaluators.scores import caption_metrics, java

RESULTS = {"b": "a dog", "a": "two cats"}
REFERENCES = {"a": ["cats", "some cats"], "b": ["the dog"]}


@pytest.fixture
def package(tmp_path, monkeypatch):
  """A fake pycocoevalcap: its interface without its programs."""
  folder = tmp_path / "pycocoevalcap"
  for name, scorer in {
    "meteor": "0.5, [float(len(refs)) for refs in gts.values()]",
    "spice": "0.25, [{'All': {'f': len(res[i][0])}, 'Size': {}} for i in gts]",
  }.items():
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").touch()
    (folder / name / f"{name}.py").write_text(
      f"class {name.capitalize()}:\n"
      "  def compute_score(self, gts, res):\n"
      "    assert list(gts) == list(res) == sorted(gts)\n"
      f"    return {scorer}\n"
    )
  (folder / "__init__.py").touch()
  monkeypatch.syspath_prepend(tmp_path)
  for name in [name for name in sys.modules if name.startswith(folder.name)]:
    monkeypatch.delitem(sys.modules, name)
  importlib.invalidate_caches()
  yield
  for name in [name for name in sys.modules if name.startswith(folder.name)]:
    del sys.modules[name]


def which(found):
  return lambda name: found if name == "java" else None


def test_scores_are_assigned_to_their_images(package, monkeypatch):
  monkeypatch.setattr(shutil, "which", which("/bin/java"))
  scores = caption_metrics.score(RESULTS, REFERENCES, ["METEOR", "SPICE"])
  assert list(scores.total) == [
    *(f"Bleu_{n}" for n in (1, 2, 3, 4)),
    *("ROUGE_L", "CIDEr", "METEOR", "SPICE"),
  ]
  assert scores.total["METEOR"] == 0.5 and scores.total["SPICE"] == 0.25
  each = scores.per_image
  assert (each["b"]["METEOR"], each["a"]["METEOR"]) == (1, 2)
  assert (each["b"]["SPICE"], each["a"]["SPICE"]) == (5, 8)


def test_a_failed_download_is_explained(package, monkeypatch):
  def fail(*_):
    raise urllib.error.URLError("no route")

  monkeypatch.setattr(java, "_run", fail)
  with pytest.raises(ValueError, match=r"downloads a parser .*: no route"):
    java.spice(["a"], [["a"]])


def test_java_is_needed_only_for_java_metrics(monkeypatch):
  monkeypatch.setattr(shutil, "which", which(None))
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert "METEOR" not in caption_metrics.score(RESULTS, REFERENCES).total


def test_missing_java_is_named(package, monkeypatch):
  monkeypatch.setattr(shutil, "which", which(None))
  with pytest.raises(
    ValueError, match=r"SPICE needs Java, .* no `java` on the"
  ):
    caption_metrics.score(RESULTS, REFERENCES, ["SPICE"])


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"METEOR needs .*'blip_jax\[coco\]'"):
    java.check(["METEOR"])


def test_unknown_metrics_are_refused():
  with pytest.raises(
    ValueError, match=r"'BLEU': expected one of .*'METEOR', 'SPICE'"
  ):
    java.check(["BLEU"])


def test_the_extra_is_declared(root):
  setup = (root / "setup.cfg").read_text()
  assert "\ncoco =\n  pycocoevalcap" in setup


@pytest.fixture
def installed():
  pytest.importorskip("pycocoevalcap", reason="needs the extra [coco]")
  if shutil.which("java") is None:
    pytest.skip("needs Java")
  java.check(["METEOR"])


def test_live_meteor_equals_the_official_scores(installed, shared_dir):
  folder = shared_dir / "data" / "coco_eval"
  case = "fakecap_in_val2017"
  ids, expected = json.loads(
    (folder / f"expected_{case}_per_image.json").read_text()
  ).values()
  words = json.loads((folder / f"tokenized_{case}.json").read_text())
  total, each = java.meteor(
    [words["hyps"][str(i)][0] for i in ids],
    [words["refs"][str(i)] for i in ids],
  )
  np.testing.assert_allclose(each, expected["METEOR"], atol=1e-9)
  assert total == pytest.approx(0.20508447515305, abs=1e-9)


def test_live_meteor_accepts_empty_captions(installed):
  _, each = java.meteor(["", "a dog"], [["a dog"], ["", "a dog"]])
  assert each[0] == 0 and each[1] > 0 and all(map(math.isfinite, each))
