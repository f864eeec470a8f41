"""What an actor of the engine `ray` does, without Ray."""

import concurrent.futures
import logging

import pytest

from blip_jax.capfilt import job, work_units
from blip_jax.capfilt.engines import actors
from blip_jax.inference import loading
from tests import jobs

UNITS = [work_units.WorkUnit(name, "scenes:train?num=1") for name in "abc"]


def test_work_units_come_as_they_are_given():
  given = actors.Given()
  claims = given.claims()
  ends = [given.add(unit) for unit in UNITS[:2]]
  assert [next(claims), next(claims)] == [(UNITS[0], 0), (UNITS[1], 0)]
  # What is held is to be ended first; then it waits for more.
  assert next(claims) is None
  given.end(UNITS[0])
  assert next(claims) is None
  given.end(UNITS[1], work_units.Unusable("gone"))
  assert ends[0].result() is None
  with pytest.raises(work_units.Unusable, match="gone"):
    ends[1].result()
  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    claim = thread.submit(next, claims)
    assert not concurrent.futures.wait([claim], timeout=0.1).done
    given.add(UNITS[2])
    assert claim.result(5) == (UNITS[2], 0)


def test_what_is_given_twice_is_done_once():
  given = actors.Given()
  ends = [given.add(UNITS[0]) for _ in range(2)]
  claims = given.claims()
  assert next(claims) == (UNITS[0], 0)
  assert next(claims) is None
  given.end(UNITS[0])
  assert [end.result(5) for end in ends] == [None, None]


def test_an_error_ends_everything():
  given = actors.Given()
  before = given.add(UNITS[0])
  given.fail(ValueError("full"))
  for end in (before, given.add(UNITS[1])):
    with pytest.raises(ValueError, match="full"):
      end.result()


@pytest.fixture
def config(tmp_path, monkeypatch):
  # An actor has a process of its own, and sets what it logs for all of it.
  monkeypatch.setattr(actors.logging, "basicConfig", lambda **_: None)
  logger = logging.getLogger("blip_jax")
  monkeypatch.setattr(logger, "setLevel", lambda _: None)
  monkeypatch.setattr(loading, "load", jobs.load_tiny)
  monkeypatch.setattr(actors.jax.config, "update", lambda *_: None)
  shards = jobs.write_scene_shards(tmp_path / "shards")
  return jobs.capfilt_config(
    shards / "*.tar", tmp_path / "out", compilation_cache=False
  )


def start(config, cwd):
  return actors.Actor(config, config.out, str(cwd), True, 1)


def test_an_actor_labels_what_it_is_called_with(config, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  units = job.find_work_units(config)
  actor = start(config, tmp_path)
  assert actor.begin().startswith("process ")
  with concurrent.futures.ThreadPoolExecutor(2) as threads:
    done = [*threads.map(actor.label, units)]
  assert [each["images"]["in"] for each in done] == [5, 5, 5]
  before = (tmp_path / "out" / "00000.parquet").stat()
  assert actor.label(units[0]) == done[0]  # nothing is done twice
  assert (tmp_path / "out" / "00000.parquet").stat() == before
  jobs.replace_by(tmp_path / "out" / "00001.parquet", "folder")
  with pytest.raises(work_units.Unusable, match=r"00001\.parquet: expected a"):
    actor.label(units[1])


def test_other_settings_are_refused(config, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  start(config, tmp_path).begin()
  config.seed = 1
  other = start(config, tmp_path)
  for call in (other.begin, lambda: other.label(UNITS[0])):
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
      call()


def test_a_machine_without_the_folder_of_the_command(config, tmp_path, caplog):
  start(config, tmp_path / "not_here").begin()
  assert "Relative paths will not be found here" in caplog.text
  assert "not_here" in caplog.text
