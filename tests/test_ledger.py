"""The ledger: what is done, and with which settings."""

import hashlib
import json
import os

import pytest

from blip_jax.capfilt import ledger, work_units
from tests import jobs


@pytest.fixture
def unit():
  return work_units.WorkUnit("a", "scenes:train?num=1")


def begin(folder):
  started = ledger.Ledger(folder)
  started.begin({"a": 1}, force=False)
  return started


NONE = dict.fromkeys(("in", "kept", "dropped", "bad"), 0)
COUNTS = {
  "images": NONE,
  "texts": {"web": NONE, "synthetic": NONE},
  "bad": {},
  "damage": [],
}


def finish(started, unit):
  started.finish(unit, b"rows", {"input": unit.fingerprint(), **COUNTS})


def test_a_folder_without_a_job_has_no_settings(tmp_path):
  with pytest.raises(ValueError, match="no job was started there"):
    _ = ledger.Ledger(tmp_path).settings


def test_other_settings_are_refused_unless_forced(tmp_path, unit):
  finish(begin(tmp_path), unit)
  other = ledger.Ledger(tmp_path)
  with pytest.raises(ValueError, match=r"a: 1 there, 2 now"):
    other.begin({"a": 2}, force=False)
  assert other.settings == {"a": 1}
  assert other.done(unit) is not None
  other.begin({"a": 2}, force=True)
  assert other.settings == {"a": 2}
  assert other.done(unit) is None


def test_done_files_without_a_job_are_refused(tmp_path, unit):
  finish(begin(tmp_path), unit)
  (tmp_path / "job.json").unlink()
  with pytest.raises(ValueError, match=r"holds work units of a job but no job"):
    begin(tmp_path)


def test_a_done_file_says_what_was_written(tmp_path, unit):
  started = begin(tmp_path)
  assert started.done(unit) is None
  finish(started, unit)
  assert (tmp_path / "a.parquet").read_bytes() == b"rows"
  assert json.loads((tmp_path / "a.done.json").read_text()) == {
    # From `printf '{"a": 1}' | sha256sum`.
    "settings": "f9d86028c6e0d64e",
    "input": {"source": "scenes:train?num=1", "rows": None},
    "output": {
      "bytes": 4,
      "sha256": hashlib.sha256(b"rows").hexdigest(),
    },
    **COUNTS,
  }
  assert started.done(unit) is not None
  (tmp_path / "a.parquet").write_bytes(b"row")
  assert started.done(unit) is None


def test_a_process_with_old_settings_stops(tmp_path, unit):
  old, new = begin(tmp_path), ledger.Ledger(tmp_path)
  new.begin({"a": 2}, force=True)
  with pytest.raises(ValueError, match="has restarted this job with other"):
    finish(old, unit)
  assert new.done(unit) is None


DAMAGED = [
  b"",
  b"{",
  b"[]",
  b"null",
  b"{}",
  b"[" * 100_000,
  b"\xff\xfe",
  json.dumps({"settings": "f9d86028c6e0d64e"}).encode(),
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_done_file_is_listed_and_its_work_unit_done_again(
  tmp_path, unit, content
):
  finish(begin(tmp_path), unit)
  (tmp_path / "a.done.json").write_bytes(content)
  started = begin(tmp_path)
  assert started.done(unit) is None
  assert "a.done.json: damaged" in started.damaged["a"]
  finish(started, unit)
  assert not started.damaged
  assert started.done(unit) is not None


@pytest.mark.parametrize("key", [*COUNTS, "settings", "input", "output"])
@pytest.mark.parametrize("value", [None, 3, "x", [3], {"x": 3}])
def test_any_value_of_a_done_file_may_be_damaged(tmp_path, unit, key, value):
  finish(started := begin(tmp_path), unit)
  path = tmp_path / "a.done.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
  assert started.done(unit) is None
  # Another digest of settings is no damage.
  assert bool(started.damaged) != (key == "settings" and value == "x")


@pytest.mark.parametrize("content", DAMAGED[:4])
def test_damaged_settings_are_written_again_if_they_are_the_same(
  tmp_path, unit, content
):
  finish(begin(tmp_path), unit)
  job = tmp_path / "job.json"
  before = job.read_bytes()
  job.write_bytes(content)
  with pytest.raises(ValueError, match=r"job.json: damaged.*writes the file"):
    _ = ledger.Ledger(tmp_path).settings
  other = ledger.Ledger(tmp_path)
  with pytest.raises(ValueError, match=r"job.json: damaged.*config.force=True"):
    other.begin({"a": 2}, force=False)
  assert job.read_bytes() == content
  assert begin(tmp_path).done(unit) is not None
  assert job.read_bytes() == before


def test_rows_of_another_size_are_not_done(tmp_path, unit):
  started = begin(tmp_path)
  finish(started, unit)
  assert started.done(unit) is not None
  (tmp_path / "a.parquet").write_bytes(b"more rows")
  assert started.done(unit) is None
  (tmp_path / "a.parquet").unlink()
  assert started.done(unit) is None


def test_rows_with_a_flipped_bit_are_damaged_and_done_again(tmp_path, unit):
  started = begin(tmp_path)
  finish(started, unit)
  assert started.done(unit) is not None
  (tmp_path / "a.parquet").write_bytes(b"rowr")
  os.utime(tmp_path / "a.parquet", (1, 1))  # a file system may count in seconds
  for other in (started, begin(tmp_path)):
    assert other.done(unit) is None
    problem = other.damaged["a"]
    assert "a.parquet: damaged" in problem and "SHA-256" in problem
    assert "does this work unit again" in problem
  finish(started, unit)
  assert started.done(unit) is not None


def test_a_digest_of_settings_has_sixteen_digits():
  digest = ledger.digest({"b": 1, "a": 2})
  assert digest == ledger.digest({"a": 2, "b": 1}) and len(digest) == 16
  assert digest != ledger.digest({"a": 2, "b": 2})


@pytest.mark.parametrize("kind", jobs.NO_FILES)
@pytest.mark.parametrize("name", ["a.done.json", "a.parquet"])
def test_what_is_no_file_is_listed_and_its_work_unit_not_done(
  tmp_path, unit, kind, name
):
  finish(begin(tmp_path), unit)
  jobs.replace_by(tmp_path / name, kind)
  started = begin(tmp_path)
  assert started.done(unit) is None
  assert f"{name}: damaged: " in started.damaged["a"]
  if kind == "folder":
    with pytest.raises(work_units.Unusable, match=f"{name}.*found a folder"):
      started.check_paths(unit)
  else:
    started.check_paths(unit)
    finish(started, unit)
    assert started.done(unit) is not None


@pytest.mark.parametrize("number", [-1, 10**99, True, 1.5])
@pytest.mark.parametrize("where", ["images", "texts"])
def test_counts_that_cannot_be_are_damage(tmp_path, unit, number, where):
  finish(started := begin(tmp_path), unit)
  path = tmp_path / "a.done.json"
  done = json.loads(path.read_text())
  counts = done["images"] if where == "images" else done["texts"]["web"]
  counts["in"] = number
  path.write_text(json.dumps(done))
  assert started.done(unit) is None
  assert "in: expected an integer from 0" in started.damaged["a"]


def test_work_units_that_are_not_done_cost_no_requests(server):
  """A listing says which may be done; only those are asked about."""
  started = begin(f"{server.bucket()}/job")
  units = [
    work_units.WorkUnit(f"{n:02d}", "scenes:train?num=1") for n in range(40)
  ]
  for unit in units[:3]:
    finish(started, unit)
  assert started.left(units[:3]) == []  # rows are compared once
  server.requests.clear()
  started.left(units[:3])
  of_three = len(server.requests)
  server.requests.clear()
  assert started.left(units) == units[3:]
  assert len(server.requests) == of_three + 1
