"""Where the time of a run went, over all processes that worked on it."""

import json

import pytest

from blip_jax.runtime import alarms, goodput
from tests import test_monitoring as monitored
from tests.test_monitoring import COMPILE, EVAL, SAVE, STEP, rows


def last(workdir):
  """The goodput of the last row that has it, by part."""
  found = [row for row in rows(workdir) if "goodput/fraction" in row]
  return {
    name.removeprefix("goodput/").removesuffix("_seconds"): pytest.approx(value)
    for name, value in found[-1].items()
    if name.startswith("goodput/")
  }


@pytest.mark.parametrize("blocks", [False, True])
def test_the_parts_of_a_run_make_up_its_time(tmp_path, monkeypatch, blocks):
  """It saves three times, and evaluates twice."""
  monitored.run(tmp_path, monkeypatch, blocks=blocks)
  useful = 35 * STEP
  total = COMPILE + STEP + useful + 3 * SAVE + 2 * EVAL
  assert last(tmp_path) == {
    "fraction": useful / total,
    "useful": useful,
    "start": 0.0,
    "compile": COMPILE + STEP,
    "input": 0.0,
    "save": 3 * SAVE,
    "eval": 2 * EVAL,
    "lost": 0.0,
    "total": total,
  }


@pytest.mark.parametrize("blocks", [False, True])
def test_only_devices_that_idle_are_counted_as_waiting(
  tmp_path, monkeypatch, blocks
):
  monitored.run(tmp_path, monkeypatch, blocks=blocks, loading=2.0)
  # All of it where the call of a step blocks; else what is left of it when the
  # step before is done, but for steps after a pause.
  alone = 35 if blocks else 3
  waited = alone * 2.0 + (35 - alone) * (2.0 - STEP)
  assert last(tmp_path)["input"] == waited
  assert last(tmp_path)["start"] == 2.0


def test_a_sentence_says_where_the_time_went(tmp_path):
  found = goodput.Goodput(tmp_path, 0, began=100.0)
  found.add("compile", 20.0)
  found.add("save", 5.0)
  assert found.summary(200.0) == (
    "Goodput 75.0%: of 100.0 s, 75.0 s were steps; compiling 20.0 s, saving "
    "5.0 s"
  )


def write(workdir, *found):
  with (workdir / "metrics.jsonl").open("a") as file:
    for step, values in found:
      file.write(json.dumps({"step": step, **values}) + "\n")


def test_steps_that_a_kill_has_undone_are_lost(tmp_path):
  """Two kills after one checkpoint, the second before there was a row."""
  first = goodput.Goodput(tmp_path, 0, began=1000.0)
  assert not first.is_continued
  first.add("compile", 30.0)
  write(tmp_path, (10, first.metrics(1050.0)), (14, first.age(1090.0)))
  # Another clock, and a process that reads what the first one left.
  second = goodput.Goodput(tmp_path, 10, began=5.0)
  assert second.is_continued
  found = second.metrics(5.0)
  assert found["goodput/lost_seconds"] == 40.0
  assert found["goodput/useful_seconds"] == 20.0
  assert found["goodput/total_seconds"] == 90.0
  (tmp_path / "metrics.jsonl").unlink()  # rows up to step 10 are kept
  write(tmp_path, (10, first.metrics(1050.0)), (10, found))
  third = goodput.Goodput(tmp_path, 10, began=0.0)
  third.add("start", 7.0)
  found = third.metrics(17.0)
  assert found["goodput/lost_seconds"] == 40.0
  assert found["goodput/start_seconds"] == 7.0
  assert found["goodput/useful_seconds"] == 30.0
  assert found["goodput/total_seconds"] == 107.0


def test_rows_of_earlier_versions_and_broken_ones_say_nothing(tmp_path):
  write(tmp_path, (3, {"train/loss": 1.0}), (4, {"goodput/total_seconds": "x"}))
  (tmp_path / "metrics.jsonl").open("a").write('{"step": 5, "good')
  assert not goodput.Goodput(tmp_path, 4, began=0.0).is_continued


def test_a_run_that_stands_still_is_told_once(monkeypatch):
  said, now = [], [0.0]
  monkeypatch.setattr(
    alarms.logging, "warning", lambda text, *a: said.append(text % a)
  )
  alarm = alarms.StallAlarm(lambda: now[0], patience=300.0)
  alarm.watch("step 7 is running")
  now[0] = 299.0
  assert not alarm.check()
  now[0] = 301.0
  assert alarm.check() and not alarm.check()
  assert "301 seconds, since step 7 is running" in said[0]
  alarm.watch("step 8 is running")
  now[0] = 401.0
  alarm.watch("the next batch is read")  # step 8 took 100 s
  now[0] += 900.0
  assert not alarm.check()
  now[0] += 101.0
  assert alarm.check()
  alarm.rest()
  now[0] += 1e6
  assert not alarm.check()
  alarm.close()
