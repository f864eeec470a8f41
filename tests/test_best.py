"""The best parameters of a run are kept complete, and found again."""

import json

import jax
import numpy as np
import pytest

from blip_jax.runtime import best, digests, files, saved_arrays, snapshot

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
  array = saved_arrays.load_to_host(kept, "params")["itm_head"]["kernel"]
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


def test_a_better_score_at_an_earlier_step_is_kept(tmp_path):
  """After going back to a checkpoint, steps are counted from there."""
  assert update(tmp_path, 80, 0.5, 0.2)
  assert update(tmp_path, 40, 0.6, 0.2)
  assert found(tmp_path) == (40, 40.0)
  assert not update(tmp_path, 90, 0.5, 0.2)
  assert found(tmp_path) == (40, 40.0)
  assert [p.name for p in (tmp_path / "best").iterdir()] == ["40"]


def test_a_better_score_at_the_same_step_is_kept(tmp_path):
  kept = best.Best(tmp_path, ("val/CIDEr",), {})
  assert kept.update(20, params(1), {"val/CIDEr": 0.5})
  assert not kept.update(20, params(2), {"val/CIDEr": 0.5})
  assert kept.update(20, params(3), {"val/CIDEr": 0.6})
  assert found(tmp_path) == (20, 3.0)
  assert [p.name for p in (tmp_path / "best").iterdir()] == ["20"]


@pytest.mark.parametrize("step", [10, 20, 30])
@pytest.mark.parametrize("completed", range(4))
def test_a_kill_at_any_time_loses_no_best(
  tmp_path, monkeypatch, step, completed
):
  """The process dies after some of: write, rename, rename, delete."""

  class Killed(BaseException):
    pass

  assert update(tmp_path, 20, 0.5, 0.2)
  changes = []

  def dying(function):
    def change(*args, **kwargs):
      if len(changes) == completed:
        raise Killed
      changes.append(function)
      return function(*args, **kwargs)

    return change

  with monkeypatch.context() as patch:
    save = best.ocp.save_checkpointables
    patch.setattr(best.ocp, "save_checkpointables", dying(save))
    for name in ("rename", "remove_folder"):
      patch.setattr(files, name, dying(getattr(files, name)))
    with pytest.raises(Killed):
      update(tmp_path, step, 0.6, 0.2)
  new = (step, float(step)) if completed == 3 else (20, 20.0)
  kept = snapshot.find(tmp_path / "best")
  array = saved_arrays.load_to_host(kept, "params")["itm_head"]["kernel"]
  assert float(array[0, 0]) == new[1]
  assert snapshot.holds_one(tmp_path / "best")
  # The run goes on, and clears up.
  assert not update(tmp_path, 50, 0.4, 0.2)
  assert update(tmp_path, 20, 0.9, 0.2)
  assert [p.name for p in (tmp_path / "best").iterdir()] == ["20"]


def test_what_is_kept_has_digests(tmp_path, caplog):
  assert update(tmp_path, 10, 0.9, 0.2)
  assert digests.exists(tmp_path / "best" / "10")
  digests.check(tmp_path / "best" / "10")
  # A best whose score cannot be read is replaced, at its own step too.
  (tmp_path / "best/10/meta/meta.json").write_text("")
  assert update(tmp_path, 10, 0.1, 0.2)
  assert "best/10 is damaged: meta/meta.json: expected" in caplog.text
  assert found(tmp_path) == (10, 10.0)
  digests.check(tmp_path / "best" / "10")


def test_scores_that_are_no_numbers_elsewhere_are_no_damage(tmp_path):
  kept = best.Best(tmp_path, ("val/CIDEr",), {})
  nan = float("nan")
  assert kept.update(1, params(1), {"val/CIDEr": 0.5, "val/SPICE": nan})
  assert not kept.update(2, params(2), {"val/CIDEr": 0.4, "val/SPICE": nan})
