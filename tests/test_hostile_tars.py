"""Hostile tar files: the samples around the damage survive, quickly."""

import itertools
import resource
import time

import pytest

from blip_jax.data import shards
from tests import hostile
from tests.hostile import tars

MAX_SECONDS = 2.0  # of the processor, with type checks
MAX_KILOBYTES = 100 << 10


def problem_of(case, path):
  """What is wrong with the index of a case; "" if nothing is."""
  path.write_bytes(case.content)
  start = time.process_time()
  try:
    source = shards.TarShards([str(path)])
  except Exception as error:
    return f"{type(error).__name__}: {error!s:.200}"
  seconds = time.process_time() - start
  if seconds > MAX_SECONDS:
    return f"{seconds:.1f} s"
  found = {}
  for row in range(len(source)):
    try:
      record = source[row]
    except Exception as error:
      if not hasattr(error, "reason"):
        return f"row {row}: {error!r:.200}"
      continue
    found[record["id"].partition(":")[2]] = record["image"], record["caption"]
  lost = [key for key, parts in case.good.items() if found.get(key) != parts]
  if lost:
    return f"lost {lost}"
  if case.is_damaged and not source.problems:
    return "no damage is reported"
  if unnamed := [line for line in source.problems if str(path) not in line]:
    return f"no shard in {unnamed}"
  return ""


def check_all(title, cases, path):
  problems = {case.name: problem_of(case, path) for case in cases}
  failed = [f"{name}: {why}" for name, why in problems.items() if why]
  hostile.report(title, len(problems), failed)
  return len(problems)


def test_a_selection_of_hostile_tars(tmp_path):
  cases = itertools.islice(tars.cases(), 0, None, 12)
  assert check_all("tars", cases, tmp_path / "a.tar") >= 30


@pytest.mark.slow
def test_hostile_tars(tmp_path):
  path = tmp_path / "a.tar"
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  for seed in range(3):
    assert check_all(f"tars, seed {seed}", tars.cases(seed), path) >= 150
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert after - before < MAX_KILOBYTES
