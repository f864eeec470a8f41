"""The quick start keeps what the README promises, for three seeds."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from blip_jax.configs import quickstart

import blip_jax
from tests import pointing

ROOT = pathlib.Path(__file__).resolve().parent.parent


def train(seed, workdir):
  subprocess.run(
    [
      sys.executable,
      "-m",
      "blip_jax.main",
      f"--config={ROOT}/configs/quickstart.py",
      f"--workdir={workdir}",
      f"--config.seed={seed}",
    ],
    env={**os.environ, "XLA_FLAGS": ""},
    check=True,
  )


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_quickstart(seed, tmp_path):
  train(seed, tmp_path)
  results = json.loads((tmp_path / "results.json").read_text())
  assert results["scenes_val/txt_r1"] >= 80
  assert results["scenes_val/img_r1"] >= 80
  assert results["scenes_val/itm_acc"] >= 95
  assert results["scenes_val/caption_exact"] >= 60


@pytest.mark.slow
def test_the_peak_of_a_map_is_on_what_it_is_of(tmp_path):
  """For the seed of the recipe; docs/saliency.md says how others fare."""
  train(quickstart.get_config().seed, tmp_path)
  found = pointing.play(blip_jax.load(tmp_path))
  assert found["match"] >= 0.8 and found["caption"] >= 0.8
  assert found["chance"] < 0.25
