"""Hostile Parquet files: a wrong byte of a footer costs that file."""

import subprocess
import sys

import pytest

from tests import hostile
from tests.hostile import tables

_CODE = """
import sys
from blip_jax.data import parquet
from tests.hostile import tables
folder, step = sys.argv[1:]
print(*tables.open_each(parquet.Parquet, folder, int(step)))
"""


def check(folder, step, title):
  """Opens all in a process of its own, which Arrow may end."""
  done = subprocess.run(
    [sys.executable, "-c", _CODE, str(folder), str(step)],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  tried, reported = map(int, done.stdout.split())
  hostile.report(title, tried, [])
  return tried, reported


def test_a_selection_of_hostile_footers(tmp_path):
  tried, reported = check(tmp_path, 17, "footers")
  assert tried > 150 and reported > 100


@pytest.mark.slow
def test_hostile_footers(tmp_path):
  tried, reported = check(tmp_path, 1, "footers, all")
  assert tried == len([*tables.footers()]) and reported > 1000
