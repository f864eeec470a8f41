"""The ledger: each work unit is done once, by whichever process."""

import hashlib
import json
import os
import socket
import subprocess
import time

import pytest

from blip_jax.capfilt import ledger, work_units


@pytest.fixture
def unit():
  return work_units.WorkUnit("a", "scenes:train?num=1")


def begin(folder, **kwargs):
  started = ledger.Ledger(folder, **kwargs)
  started.begin({"a": 1}, force=False)
  return started


def finish(started, unit):
  started.finish(unit, b"rows", {"input": unit.fingerprint()})


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
  }
  assert started.done(unit) is not None
  (tmp_path / "a.parquet").write_bytes(b"row")
  assert started.done(unit) is None


def test_old_temporary_files_are_deleted(tmp_path):
  for name in (".a.parquet.1.tmp", ".b.parquet.2.tmp", "c.tmp"):
    (tmp_path / name).write_text("x")
  for name in (".a.parquet.1.tmp", "c.tmp"):
    os.utime(tmp_path / name, (100, 100))
  begin(tmp_path)
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    ".b.parquet.2.tmp",
    "c.tmp",
    "job.json",
  ]


def test_a_work_unit_is_leased_to_one_process(tmp_path):
  units = [
    work_units.WorkUnit(str(n), f"scenes:train?num={n}") for n in range(1, 4)
  ]
  first, second = begin(tmp_path), begin(tmp_path)
  claims, other_claims = first.claims(units), second.claims(units)
  (a, _), (b, _) = next(claims), next(other_claims)
  assert (a.name, b.name) == ("1", "2")
  assert first.leased().keys() == {"1", "2"}
  finish(first, a)
  (c, num_done), _ = next(claims), finish(second, b)
  assert (c.name, num_done) == ("3", 1)
  finish(first, c)
  assert list(claims) == []
  assert list(other_claims) == []
  assert second.leased() == {}


def test_a_process_with_old_settings_stops(tmp_path, unit):
  old, new = begin(tmp_path), ledger.Ledger(tmp_path)
  next(old.claims([unit]))
  new.begin({"a": 2}, force=True)
  with pytest.raises(ValueError, match="has restarted this job with other"):
    finish(old, unit)
  assert new.done(unit) is None


@pytest.mark.parametrize("gone", ["old", "dead"])
def test_a_lease_of_a_process_that_is_gone_is_taken_over(tmp_path, gone, unit):
  started = begin(tmp_path, lease_seconds=30.0)
  lease = tmp_path / ".a.lease"
  owner = {"host": "elsewhere", "pid": 1, "id": "x"}
  if gone == "dead":
    with subprocess.Popen(["true"]) as process:
      process.wait()
    owner = {"host": socket.gethostname(), "pid": process.pid, "id": "x"}
  lease.write_text(json.dumps(owner))
  if gone == "old":
    os.utime(lease, (time.time() - 31, time.time() - 31))
  assert next(started.claims([unit]))[0] == unit


def test_a_recent_lease_is_waited_for(tmp_path, unit):
  started = begin(tmp_path, lease_seconds=0.5)
  owner = {"host": "elsewhere", "pid": 1, "id": "x"}
  (tmp_path / ".a.lease").write_text(json.dumps(owner))
  start = time.monotonic()
  assert next(started.claims([unit]))[0] == unit
  assert time.monotonic() - start > 0.3


def test_a_lease_is_renewed_while_its_owner_works(tmp_path, unit):
  started, other = begin(tmp_path, lease_seconds=0.5), begin(tmp_path)
  next(claims := started.claims([unit]))
  time.sleep(1.2)
  assert started.leased()["a"]["seconds"] < 0.5
  finish(started, unit)
  assert list(other.claims([unit])) == []
  assert list(claims) == []


def test_a_lease_that_was_deleted_is_not_created_again(tmp_path, unit):
  started = begin(tmp_path, lease_seconds=0.5)
  next(claims := started.claims([unit]))
  (tmp_path / ".a.lease").unlink()
  time.sleep(0.3)  # at least two renewals
  assert not (tmp_path / ".a.lease").exists()
  finish(started, unit)
  assert list(claims) == []


@pytest.mark.parametrize("lease_seconds, wait", [(2.0, 0.4), (300.0, 1.0)])
def test_other_processes_are_asked_every_second_or_more_often(
  tmp_path, monkeypatch, unit, lease_seconds, wait
):
  """A fifth of the time of a lease, and a second at most."""
  started = begin(tmp_path, lease_seconds=lease_seconds)
  owner = {"host": "elsewhere", "pid": 1, "id": "x"}
  lease, waited = tmp_path / ".a.lease", []
  lease.write_text(json.dumps(owner))

  def sleep(seconds):
    waited.append(seconds)
    if len(waited) == 3:
      lease.unlink()

  monkeypatch.setattr(ledger.time, "sleep", sleep)
  assert next(started.claims([unit]))[0] == unit
  assert waited == [wait] * 3


def test_a_live_process_of_this_host_keeps_its_lease(tmp_path):
  started = begin(tmp_path, lease_seconds=30.0)
  lease = tmp_path / ".a.lease"
  for host, pid, is_abandoned in (
    (socket.gethostname(), os.getpid(), False),
    (socket.gethostname(), 2**22 + 5, True),
    ("elsewhere", 2**22 + 5, False),
  ):
    lease.write_text(json.dumps({"host": host, "pid": pid, "id": "x"}))
    assert started._is_abandoned(lease) == is_abandoned
  lease.write_text('{"host":')  # its owner is still writing it
  assert not started._is_abandoned(lease)


def test_a_process_of_another_user_is_alive(monkeypatch):
  def refuse(pid, signal):
    assert signal == 0
    raise PermissionError

  monkeypatch.setattr(os, "kill", refuse)
  assert ledger._is_alive(1)


def test_rows_of_another_size_are_not_done(tmp_path, unit):
  started = begin(tmp_path)
  finish(started, unit)
  assert started.done(unit) is not None
  (tmp_path / "a.parquet").write_bytes(b"more rows")
  assert started.done(unit) is None
  (tmp_path / "a.parquet").unlink()
  assert started.done(unit) is None


def test_a_digest_of_settings_has_sixteen_digits():
  digest = ledger.digest({"b": 1, "a": 2})
  assert digest == ledger.digest({"a": 2, "b": 1}) and len(digest) == 16
  assert digest != ledger.digest({"a": 2, "b": 2})
