"""Killed at any moment, started twice, damaged: no job loses its work."""

import contextlib
import dataclasses
import json
import random
import signal
import time

import pytest

from blip_jax import defaults
from blip_jax.capfilt import audit, merge, report
from tests import hostile, jobs
from tests.hostile import states

SEED = 18
KILLS = {
  "caption": 4,
  "search": 4,
  "capfilt": 5,
  "merge": 4,
  "train": 4,
  "workers": 4,
}
MAKERS = {
  "caption": states.caption_job,
  "search": states.search_job,
  "capfilt": states.capfilt_job,
  "merge": states.merge_job,
  "train": lambda root: states.train_job(root, 0),
  "workers": lambda root: states.train_job(root, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_kills_change_no_byte_and_leave_nothing(tmp_path, kind):
  failed = states.kill_often(MAKERS[kind](tmp_path), KILLS[kind], SEED)
  hostile.report(f"kills of {kind}", KILLS[kind], failed)


def test_a_merge_that_is_killed_leaves_nothing(tmp_path):
  """The slim one of the kills above."""
  job = states.merge_job(tmp_path)
  settings = defaults.capfilt().lock()
  settings.update(
    source=(str(tmp_path / "merged" / "web.json"),),
    image_root=str(tmp_path / "merged" / "images"),
    out=str(tmp_path / "merged" / "out"),
  )
  settings.merge.out = str(job.folder / "clean")
  job.folder.mkdir()
  merge.merge(settings, settings.out)
  expected = job.output()
  assert len(expected) == 2
  started = job.start()
  while not any(name.endswith(".tmp") for name in job.leftovers()):
    assert started.process.poll() is None, "it was done too soon"
    time.sleep(0.002)
  assert started.kill(0)
  assert not started.alive_after(10)
  job.finish()
  assert job.output() == expected
  assert not job.leftovers()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["caption", "search", "merge", "train"])
def test_two_at_once_are_refused_or_harmless(tmp_path, kind):
  job = MAKERS[kind](tmp_path)
  job.finish()
  expected = job.output()
  states.empty(job.folder)
  started = [job.start().process for _ in range(2)]
  errors = [process.communicate(timeout=600)[1] for process in started]
  statuses = [process.returncode for process in started]
  refused = [
    error
    for error, status in zip(errors, statuses, strict=True)
    if status and "works here; two processes would spoil" in error
  ]
  failed = [
    error[-2000:]
    for error, status in zip(errors, statuses, strict=True)
    if status and error not in refused
  ]
  failed += ["both were refused"] * (len(refused) == 2)
  failed += ["other bytes"] * (job.output() != expected)
  failed += job.leftovers()
  hostile.report(f"two of {kind}", 2, failed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kind", ["caption", "search", "capfilt", "train"])
def test_a_request_to_stop_has_a_status_and_costs_nothing(
  tmp_path, kind, number
):
  job = MAKERS[kind](tmp_path)
  job.finish()
  expected = job.output()
  states.empty(job.folder)
  process = job.start().process
  while "Devices:" not in process.stderr.readline():
    assert process.poll() is None
  time.sleep(random.Random(SEED + number).uniform(0, 1))
  process.send_signal(number)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 75, errors[-2000:]
  assert "stopped: " in errors and "Traceback" not in errors
  assert not job.leftovers()
  job.finish()
  assert job.output() == expected


@pytest.mark.slow
def test_an_evaluation_does_not_wait_for_its_end(tmp_path):
  job = states.train_job(tmp_path, 0)
  job.finish()
  more = (
    "--config.job=evaluate",
    # Minutes.
    "--config.evals.scenes_val.source=scenes:val?num=1300",
    "--config.evals.batch_size=2",
  )
  job = dataclasses.replace(job, flags=(*job.flags[:-1], *more))
  process = job.start().process
  while "Evaluating" not in process.stderr.readline():
    assert process.poll() is None
  time.sleep(5)
  start = time.monotonic()
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 75, errors[-2000:]
  assert time.monotonic() - start < 20


def damage(content, rng):
  """One of the ways in which small files break."""
  cut = rng.randrange(len(content))
  flipped = bytearray(content)
  flipped[cut] ^= 1 << rng.randrange(8)
  return rng.choice(
    [
      b"",
      content[:cut],
      bytes(flipped),
      rng.randbytes(len(content)),
      bytes(len(content)),
      b"null",
      b"[" * 100_000,
    ]
  )


def damage_json(content, rng):
  """Another value somewhere in an object."""
  value = json.loads(content)
  inner = value
  while True:
    key = rng.choice([*inner])
    if isinstance(inner[key], dict) and inner[key] and rng.random() < 0.7:
      inner = inner[key]
      continue
    inner[key] = rng.choice([None, -1, "x", [], {}, [[]], True, 1e99])
    return json.dumps(value).encode()


def try_damage(folder, number):
  """Damages a file of a finished job; returns what did not survive."""
  rng = random.Random(f"{SEED} {number}")
  settings = jobs.write_listed_capfilt_job(folder)
  out = folder / "out"
  (out / "log").mkdir(exist_ok=True)
  (out / "log" / "a-1.jsonl").write_text('{"images": 3, "seconds": 1.0}\n' * 3)
  paths = sorted(path for path in out.rglob("*") if path.is_file())
  path = rng.choice(paths)
  content = path.read_bytes()
  if path.suffix == ".json" and rng.random() < 0.5:
    path.write_bytes(damage_json(content, rng))
  else:
    path.write_bytes(damage(content, rng))
  failed = []
  for job in (audit.status, audit.verify, report.report, merge.merge):
    try:
      with contextlib.suppress(ValueError):  # one message
        job(settings, settings.out)
    except Exception as error:
      failed.append(f"{number}: {path.name}, {job.__name__}: {error!r}")
  return failed


@pytest.mark.parametrize("number", range(12))
def test_jobs_on_damaged_files_end_with_one_message(tmp_path, number):
  assert not try_damage(tmp_path, number)


@pytest.mark.slow
def test_every_job_survives_every_damage(tmp_path):
  failed, count = [], 300
  for number in range(count):
    (folder := tmp_path / str(number)).mkdir()
    failed += try_damage(folder, number)
  hostile.report("damaged small files of CapFilt", count, failed)
