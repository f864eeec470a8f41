"""The best parameters of a run are kept complete, and found again."""

import json

import jax
import numpy as np
import pytest

from blip_jax.runtime import best, snapshot

NAMES = ("val/CIDEr", "val/Bleu_4")


def params(value):
  return {"itm_head": {"kernel": jax.numpy.full((2, 3), value, np.float32)}}


def update(folder, step, *scores):
  """A run that may have been continued; its parameters are the step."""
  kept = best.Best(folder, NAMES, {"model.json": "{}"})
  results = dict(zip((*NAMES, "test/CIDEr"), (*scores, 9.0), strict=True))
  return kept.update(step, params(step), results)


def found(folder):
  kept = snapshot.find(folder / "best")
  array = snapshot.load_to_host(kept, "params")["itm_head"]["kernel"]
  assert (array == array[0, 0]).all()
  return int(kept.name), float(array[0, 0])


def test_the_best_sum_is_kept(tmp_path):
  assert update(tmp_path, 10, 0.5, 0.2)
  assert found(tmp_path) == (10, 10.0)
  # One metric is better, the sum is not.
  assert not update(tmp_path, 20, 0.6, 0.05)
  assert not update(tmp_path, 30, 0.5, 0.2)
  assert not update(tmp_path, 40, float("nan"), 0.2)
  assert found(tmp_path) == (10, 10.0)
  assert update(tmp_path, 50, 0.5, 0.3)
  assert found(tmp_path) == (50, 50.0)
  assert [p.name for p in (tmp_path / "best").iterdir()] == ["50"]
  meta = json.loads((tmp_path / "best/50/meta/meta.json").read_text())
  assert meta["step"] == 50 and meta["score"] == 0.8
  assert meta["results"]["test/CIDEr"] == 9.0
  assert (tmp_path / "best/50/model/model.json").exists()
  assert snapshot.holds_one(tmp_path / "best")


def test_nothing_is_kept_unless_asked_for(tmp_path):
  assert not best.Best(tmp_path, ()).update(1, params(1), {})
  assert not list(tmp_path.iterdir())


def test_an_unknown_metric_is_refused(tmp_path):
  with pytest.raises(ValueError, match="no evaluator reports val/Bleu_4; "):
    best.Best(tmp_path, NAMES).update(1, params(1), {"val/CIDEr": 1.0})
