"""The engine `array`: tasks that share nothing but the files of a job."""

import re

import pyarrow.parquet
import pytest

from blip_jax.capfilt import audit, job, ledger, work_units
from blip_jax.capfilt.engines import array, handout
from blip_jax.inference import loading
from blip_jax.runtime import processes
from blip_jax.runtime.command import UsageError
from tests import jobs


def slurm(id, first=0, last=3, count=None, **more):
  """The variables of a task of `sbatch --array`."""
  numbers = {"ID": id, "MIN": first, "MAX": last, "COUNT": count, "STEP": 1}
  if count is None:
    numbers["COUNT"] = (last - first) // int(more.get("STEP", 1)) + 1
  return {
    f"SLURM_ARRAY_TASK_{k}": str(v) for k, v in {**numbers, **more}.items()
  }


def kubernetes(index, **more):
  return {"JOB_COMPLETION_INDEX": str(index), **more}


@pytest.mark.parametrize(
  "keys, environ, expected",
  [
    ((-1, 0), slurm(2), (2, 4)),
    ((-1, 4), slurm(2), (2, 4)),
    ((-1, 0), slurm(5, 5, 7), (0, 3)),
    ((-1, 0), slurm(14, 10, 16, STEP=2), (2, 4)),
    # --array=1-8:3
    ((-1, 0), slurm(7, 1, 7, STEP=3), (2, 3)),
    ((-1, 0), slurm(2) | {"SLURM_STEP_NUM_TASKS": "1"}, (2, 4)),
    ((-1, 0), kubernetes(0, JOB_COMPLETIONS="1"), (0, 1)),
    ((-1, 5), kubernetes(4), (4, 5)),
    ((-1, 0), slurm(2) | kubernetes(2, JOB_COMPLETIONS="4"), (2, 4)),
    # Keys are a person's own.
    ((1, 9), slurm(2) | kubernetes(3), (1, 9)),
    ((0, 1), {}, (0, 1)),
  ],
)
def test_who_says_which_task_this_is(keys, environ, expected):
  assert array.this_task(*keys, environ) == expected


@pytest.mark.parametrize(
  "keys, environ, message",
  [
    ((-1, 0), {}, "sbatch --array=0-7.*JOB_COMPLETION_INDEX.*found neither"),
    ((-1, 4), {}, "found neither"),
    ((2, 0), {}, r"config\.array\.count is missing"),
    ((4, 4), {}, r"config\.array\.index: expected 0 to .* is 3, found 4"),
    ((-2, 4), {}, r"config\.array\.index: .* found -2"),
    ((-1, 0), slurm("x"), "TASK_ID: expected a number, found 'x'"),
    ((-1, 0), slurm("²"), "TASK_ID: expected a number, found '²'"),
    ((-1, 0), {"SLURM_ARRAY_TASK_ID": "3"}, "TASK_MIN: .* found ''"),
    ((-1, 0), slurm(9, 0, 3), "TASK_ID: expected 0 to .* is 3, found 9"),
    ((-1, 0), slurm(3, 1, 7, 3), "--array=0-7, found a list of 3 from 1 to 7"),
    ((-1, 0), slurm(3, 2, 6, STEP=2), "in which the place of 3 is not known"),
    ((-1, 5), slurm(2), r"count=5: the array has 4 tasks"),
    (
      (-1, 0),
      slurm(2) | {"SLURM_STEP_NUM_TASKS": "2"},
      "each of them would do the same; .*--ntasks=1.*engine=local",
    ),
    ((-1, 0), kubernetes(2), "JOB_COMPLETIONS, or config.array.count, to spec"),
    ((-1, 2), kubernetes(2), r"INDEX: expected 0 to config\.array\.count - 1"),
    ((-1, 0), kubernetes(0, JOB_COMPLETIONS="0"), "which is -1, found 0"),
    ((-1, 0), kubernetes("", JOB_COMPLETIONS="1"), "INDEX: expected a number"),
    (
      (-1, 5),
      kubernetes(1, JOB_COMPLETIONS="4"),
      "count=5: the array has 4 tasks",
    ),
    (
      (-1, 0),
      slurm(2) | kubernetes(1, JOB_COMPLETIONS="4"),
      "contradictory variables: Slurm says 2 of 4 and Kubernetes says 1 of 4",
    ),
  ],
)
def test_what_says_no_task_is_refused(keys, environ, message):
  with pytest.raises(UsageError, match=message):
    array.this_task(*keys, environ)


@pytest.fixture
def shards(tmp_path, monkeypatch):
  monkeypatch.setattr(loading, "load", jobs.load_tiny)
  return jobs.write_scene_shards(tmp_path / "shards")


def run_task(shards, out, index, count, **changes):
  config = jobs.capfilt_config(shards / "*.tar", out, engine="array", **changes)
  config.array.update(index=index, count=count)
  return job.run(config, config.out)


def content(folder):
  """Name -> bytes of all files that must be equal for equal settings."""
  return {
    path.name: path.read_bytes()
    for path in sorted(folder.iterdir())
    if path.suffix in (".json", ".parquet")
  }


def rows(folder):
  """Name -> rows, which tell more of a difference than bytes do."""
  return {
    path.name: pyarrow.parquet.read_table(path).to_pylist()
    for path in sorted(folder.glob("*.parquet"))
  }


def test_two_tasks_write_the_bytes_of_local(shards, tmp_path, caplog):
  config = jobs.capfilt_config(shards / "*.tar", tmp_path / "local")
  total = job.run(config, config.out)
  out = tmp_path / "out"
  with caplog.at_level("INFO", logger="blip_jax"):
    results = [run_task(shards, out, index, 2) for index in (1, 0)]
  assert "Task 1 of 2, counted from 0: 1 of 3 work units" in caplog.text
  assert [each["work_units"] for each in results] == [1, 2]
  assert {k: results[0][k] + results[1][k] for k in total} == total
  assert rows(out) == rows(tmp_path / "local")
  assert content(out) == content(tmp_path / "local")
  assert not [*out.glob(".*")]


def test_a_job_goes_on_with_another_engine(shards, tmp_path):
  whole = jobs.capfilt_config(shards / "*.tar", tmp_path / "local")
  job.run(whole, whole.out)
  run_task(shards, tmp_path / "out", 1, 2)
  before = (tmp_path / "out" / "00001.parquet").stat()
  rest = jobs.capfilt_config(shards / "*.tar", tmp_path / "out")
  assert job.run(rest, rest.out)["work_units_done"] == 3
  assert content(tmp_path / "out") == content(tmp_path / "local")
  assert (tmp_path / "out" / "00001.parquet").stat() == before


def test_status_sees_all_tasks(shards, tmp_path, caplog):
  out = tmp_path / "out"
  run_task(shards, out, 0, 2)
  config = jobs.capfilt_config(shards / "*.tar", out)
  with caplog.at_level("INFO", logger="blip_jax"):
    results = audit.status(config, config.out)
  assert (results["work_units"], results["work_units_done"]) == (3, 2)
  assert re.search(r"process \d+ on \S+: 2 work units, 10 images", caplog.text)


def test_a_task_without_work_units_loads_no_model(
  shards, tmp_path, monkeypatch
):
  monkeypatch.delattr(loading, "load")
  results = run_task(shards, tmp_path / "out", 3, 4)
  assert results["work_units"] == results["images/in"] == 0
  assert not (tmp_path / "out").exists()


def test_a_task_whose_shard_is_broken_says_so_and_ends_well(
  shards, tmp_path, caplog
):
  (shards / "00001.tar").write_bytes(b"not a tar")
  results = run_task(shards, tmp_path / "out", 1, 3)
  assert (results["work_units_done"], results["images/in"]) == (1, 0)
  assert "Of the work units of this task: config.source: no im" in caplog.text
  for name in ("00000", "00002"):
    (shards / f"{name}.tar").unlink()
  with pytest.raises(ValueError, match="no image can be used"):
    run_task(shards, tmp_path / "other", 0, 1)


def test_tasks_with_other_settings_are_refused(shards, tmp_path):
  run_task(shards, tmp_path / "out", 0, 2)
  before = content(tmp_path / "out")
  with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
    run_task(shards, tmp_path / "out", 1, 2, seed=1)
  assert content(tmp_path / "out") == before


def test_a_task_that_began_with_other_settings_stops(tmp_path):
  """Two tasks begin at once, with different settings: one stays."""
  unit = work_units.WorkUnit("a", "scenes:train?num=1")
  first, second = ledger.Ledger(tmp_path), ledger.Ledger(tmp_path)
  first.begin({"seed": 0}, force=False)
  (tmp_path / "job.json").unlink()
  second.begin({"seed": 1}, force=False)
  with pytest.raises(ValueError, match="other settings; this process stops"):
    first.finish(unit, b"rows", {"input": unit.fingerprint()})


def test_what_cannot_be_read_comes_again_after_all_others(tmp_path):
  units = [work_units.WorkUnit(n, f"scenes:train?num=1&x={n}") for n in "ab"]
  book = ledger.Ledger(tmp_path)
  book.begin({"a": 1}, force=False)
  share = handout.Share(units, book)
  claims = share.claims()
  error = work_units.Unusable("gone for now")
  for _ in range(2):
    assert [next(claims)[0] for _ in units] == units
    assert next(claims) is None
    share.end(units[0], error)
    share.end(units[1], error)
  assert next(claims)[0] == units[0]
  with pytest.raises(ValueError, match=r"2 work units .* 3 tries.* gone for"):
    share.end(units[0], error)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(engine="slurm"), "config.engine: expected one of .*, found 'slurm'"),
    (
      dict(array=dict(index=1)),
      r"array\.index=1: of config\.engine=array",
    ),
    (
      dict(array=dict(count=2)),
      r"array\.count=2: of config\.engine=array",
    ),
    (dict(ray=dict(actors=2)), r"ray\.actors=2: of config\.engine=ray, found"),
  ],
)
def test_engines_that_cannot_be(shards, tmp_path, changes, message):
  config = jobs.capfilt_config(shards / "*.tar", tmp_path / "out")
  config.update(changes)
  with pytest.raises(UsageError, match=message):
    job.run(config, config.out)
  assert not (tmp_path / "out").exists()


def test_tasks_do_not_join(shards, tmp_path, monkeypatch):
  monkeypatch.setattr(processes, "has_peers", lambda: True)
  with pytest.raises(UsageError, match="leave out --distributed"):
    run_task(shards, tmp_path / "out", 0, 2)
