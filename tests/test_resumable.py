"""A job is resumed by its own settings, and refuses others."""

import math
import os

import pytest

from blip_jax.runtime import files, resumable


def test_the_same_settings_resume(tmp_path):
  path = tmp_path / "job.json"
  assert resumable.settings(path) is None
  first = resumable.begin(path, {"seed": 0, "sizes": (2, 3)}, "hint")
  assert first == {"seed": 0, "sizes": [2, 3]}
  written = files.read_bytes(path)
  assert resumable.begin(path, {"seed": 0, "sizes": [2, 3]}, "hint") == first
  assert files.read_bytes(path) == written
  assert resumable.settings(path) == first


def test_other_settings_are_refused_by_name(tmp_path):
  path = tmp_path / "job.json"
  resumable.begin(path, {"seed": 0, "rate": 1.0, "old": "x"}, "hint")
  with pytest.raises(ValueError) as error:
    resumable.begin(path, {"seed": 1, "rate": 1.0, "new": math.inf}, "Do this.")
  assert str(error.value) == (
    f"{path}: this job was started with other settings:\n"
    "  seed: 0 there, 1 now\n"
    "  new: None there, 'Infinity' now\n"
    "  old: 'x' there, None now\n"
    "Do this."
  )
  assert resumable.settings(path) == {"seed": 0, "rate": 1.0, "old": "x"}


def test_other_settings_can_be_forced(tmp_path):
  path = tmp_path / "job.json"
  resumable.begin(path, {"seed": 0}, "hint")
  resumable.begin(path, {"seed": 1}, "hint", force=True)
  assert resumable.settings(path) == {"seed": 1}


@pytest.mark.parametrize("make_other", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_named(tmp_path, make_other):
  path = tmp_path / "job.json"
  make_other(path)
  with pytest.raises(
    files.DamagedFile, match=r"job.json: damaged: expected a file.*hint"
  ):
    resumable.begin(path, {}, "hint")
