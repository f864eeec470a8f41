"""The engine `local`: each work unit is done once, by whichever process."""

import json
import os
import socket
import subprocess
import time

import pytest

from blip_jax.capfilt import ledger, work_units
from blip_jax.capfilt.engines import local
from blip_jax.runtime import lock


@pytest.fixture
def unit():
  return work_units.WorkUnit("a", "scenes:train?num=1")


class Process:
  """What a process of the job has."""

  def __init__(self, folder, units, lease_seconds=300.0):
    self.ledger = ledger.Ledger(folder)
    self.ledger.begin({"a": 1}, force=False)
    self.leased = local.Leased(units, self.ledger, lease_seconds)
    self.claims = self.leased.claims()

  def finish(self, unit):
    none = dict.fromkeys(("in", "kept", "dropped", "bad"), 0)
    report = {
      "input": unit.fingerprint(),
      "images": none,
      "texts": {"web": none, "synthetic": none},
      "bad": {},
      "damage": [],
    }
    self.ledger.finish(unit, b"rows", report)
    self.leased.end(unit)


def test_a_work_unit_is_leased_to_one_process(tmp_path):
  units = [
    work_units.WorkUnit(str(n), f"scenes:train?num={n}") for n in range(1, 4)
  ]
  first, second = Process(tmp_path, units), Process(tmp_path, units)
  (a, _), (b, _) = next(first.claims), next(second.claims)
  assert (a.name, b.name) == ("1", "2")
  assert local.owners(tmp_path).keys() == {"1", "2"}
  assert f"process {os.getpid()} on" in local.owners(tmp_path)["1"]
  first.finish(a)
  (c, num_done), _ = next(first.claims), second.finish(b)
  assert (c.name, num_done) == ("3", 1)
  first.finish(c)
  assert list(first.claims) == []
  assert list(second.claims) == []
  assert local.owners(tmp_path) == {}


def test_several_work_units_may_be_held_at_once(tmp_path):
  a, b = [
    work_units.WorkUnit(n, "scenes:train?num=1", rows=(0, 1)) for n in "ab"
  ]
  process = Process(tmp_path, [a, b])
  assert [next(process.claims), next(process.claims)] == [(a, 0), (b, 1)]
  assert local.owners(tmp_path).keys() == {"a", "b"}
  # Nothing is left before one of these is finished or given back.
  assert next(process.claims) is None
  process.finish(a)
  assert local.owners(tmp_path).keys() == {"b"}
  process.leased.end(b, work_units.Unusable("for now"))
  assert local.owners(tmp_path) == {}
  assert next(process.claims) == (b, 1)
  assert next(process.claims) is None
  process.finish(b)
  assert list(process.claims) == []


@pytest.mark.parametrize("gone", ["silent", "dead"])
def test_a_lease_of_a_process_that_is_gone_is_taken_over(tmp_path, gone, unit):
  lease = tmp_path / ".a.lease"
  owner = {"host": "elsewhere", "pid": 1, "id": "x"}
  if gone == "dead":
    with subprocess.Popen(["true"]) as process:
      process.wait()
    owner = {"host": socket.gethostname(), "pid": process.pid, "id": "x"}
  lease.write_text(json.dumps(owner))
  # Written in the future, by the clock of its host.
  os.utime(lease, (4e9, 4e9))
  process = Process(tmp_path, [unit], 0.5)
  start = time.monotonic()
  assert next(process.claims)[0] == unit
  waited = time.monotonic() - start
  assert waited < 0.3 if gone == "dead" else 0.5 < waited < 1.5


def test_a_lease_is_renewed_while_its_owner_works(tmp_path, unit):
  process, other = Process(tmp_path, [unit], 0.5), Process(tmp_path, [unit])
  next(process.claims)
  before = lock.owner(tmp_path / ".a.lease")["beat"]
  time.sleep(0.6)
  assert lock.owner(tmp_path / ".a.lease")["beat"] > before
  process.finish(unit)
  assert list(other.claims) == []
  assert list(process.claims) == []


def test_a_stuck_process_does_not_keep_its_lease(tmp_path, unit):
  """Its thread would renew it for ever; both write the same bytes."""
  stuck = Process(tmp_path, [unit], 0.2)
  next(stuck.claims)
  for _ in range(3):
    time.sleep(0.8)
    stuck.leased.progress()
  beat = lock.owner(tmp_path / ".a.lease")["beat"]
  assert beat > 30  # thirty beats a second, for 2.4 seconds
  other = Process(tmp_path, [unit], 0.2)
  start = time.monotonic()
  assert next(other.claims)[0] == unit
  assert 1.0 < time.monotonic() - start < 3.0
  stuck.finish(unit)
  assert list(stuck.claims) == []
  assert (tmp_path / ".a.lease").exists()  # of the other
  assert list(other.claims) == []
  assert not (tmp_path / ".a.lease").exists()


def test_a_work_unit_is_released_when_its_process_stops(tmp_path, unit):
  process = Process(tmp_path, [unit])
  next(process.claims)
  assert (tmp_path / ".a.lease").exists()
  process.claims.close()
  assert not (tmp_path / ".a.lease").exists()


def test_a_lease_that_was_deleted_is_not_created_again(tmp_path, unit):
  process = Process(tmp_path, [unit], 0.5)
  next(process.claims)
  (tmp_path / ".a.lease").unlink()
  time.sleep(0.3)  # at least two renewals
  assert not (tmp_path / ".a.lease").exists()
  process.finish(unit)
  assert list(process.claims) == []


@pytest.mark.parametrize("lease_seconds, wait", [(2.0, 0.4), (300.0, 1.0)])
def test_other_processes_are_asked_every_second_or_more_often(
  tmp_path, monkeypatch, unit, lease_seconds, wait
):
  """A fifth of the time of a lease, and a second at most."""
  process = Process(tmp_path, [unit], lease_seconds)
  owner = {"host": "elsewhere", "pid": 1, "id": "x"}
  lease, waited = tmp_path / ".a.lease", []
  lease.write_text(json.dumps(owner))

  def sleep(seconds):
    waited.append(seconds)
    if len(waited) == 3:
      lease.unlink()

  monkeypatch.setattr(local.time, "sleep", sleep)
  assert next(process.claims)[0] == unit
  assert waited == [wait] * 3
