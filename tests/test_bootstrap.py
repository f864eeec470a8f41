"""Table 1 in miniature: how it is measured, and that all of it runs."""

import json
import pathlib

import pytest

from blip_jax import defaults
from blip_jax.capfilt import bootstrap
from blip_jax.data import scenes
from tests.test_merge import make_job
from tests.test_train import load_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
SPEC = "scenes:train?num=10&noise=0.4&junk=web"


def test_a_job_is_compared_with_the_truth(tmp_path):
  source = scenes.Scenes("train", num=10, noise=0.4, junk="web")
  config = defaults.capfilt().lock()
  config.update(source=(SPEC,), out=str(tmp_path))
  texts, wrong = [], 0
  for n in range(10):
    record = source[n]
    wrong += bool(record["noise"])
    # The filter keeps the first two, whatever they are; the captioner is right
    # of every second picture.
    web = ("web", 0.9 if n < 2 else 0.1, record["caption"])
    written = record["references"][0] if n % 2 else "a blue elephant"
    texts.append([web, ("synthetic", 0.8 if n < 5 else 0.2, written)])
  make_job(config.out, config, {"scenes-train-00000": texts})
  kept = [bool(source[n]["noise"]) for n in range(2)]
  found = bootstrap.compare(config.out)
  assert 0 < wrong < 10
  assert found["texts/noise"] == pytest.approx(10 * wrong)
  assert found["filter/wrong_removed"] == pytest.approx(
    100 * (wrong - sum(kept)) / wrong
  )
  assert found["filter/right_kept"] == pytest.approx(
    100 * (2 - sum(kept)) / (10 - wrong)
  )
  assert found["captioner/right"] == 50
  assert found["captioner/right_of_kept"] == 40
  assert found["texts/synthetic_kept"] == 5


def test_the_table_has_means_and_ranges():
  names = [f"{r}/{m}" for r in bootstrap.RUNS for m in bootstrap.METRICS]
  names += ["filter/wrong_removed", "filter/right_kept", "captioner/right"]
  names += ["captioner/right_of_kept"]
  found = {seed: dict.fromkeys(names, 10.0 * seed) for seed in (1, 2, 6)}
  text = bootstrap.table(found)
  assert text.count("| 30.0 (10.0-60.0) |") == 4 * 2
  assert "Means of 3 seeds" in text
  assert text.count("- filter/wrong_removed: 30.0 (10.0-60.0)") == 1


def test_the_papers_settings():
  config = load_config(ROOT / "configs" / "capfilt_paper.py")
  assert config.threshold == config.merge.threshold == 0.5
  assert config.generation.sample
  assert config.generation.top_p == 0.9
  assert config.generation.num_return_sequences == 1
  assert config.captioner != config.filter


@pytest.mark.slow
def test_the_whole_experiment(tmp_path):
  """Of too few steps to show anything, but for what is left behind."""
  config = load_config(ROOT / "configs" / "bootstrap.py")
  config.seeds = (0,)
  config.web, config.clean = SPEC + "&seed={seed}", "scenes:train?num=32"
  for name, steps in (("pretrain", 20), ("captioner", 4), ("filter", 4)):
    config[name].update(num_steps=steps, log_every_steps=2)
    config[name].optim.warmup_steps = 2
    config[name].evals.test.source = "scenes:test?num=20"
  config.capfilt.threshold = 0.2
  results = bootstrap.bootstrap(config, str(tmp_path))
  left = json.loads((tmp_path / "results.json").read_text())
  for name in (f"{r}/{m}" for r in bootstrap.RUNS for m in bootstrap.METRICS):
    assert left[name] == left[f"{name}/seed_0"] == results[name]
  assert {"filter/wrong_removed", "filter/right_kept"} < left.keys()
  assert (tmp_path / "table.md").read_text().startswith("| bootstrapped by |")
  # What is done is not done again.
  marker = tmp_path / "seed_0" / "both" / "results.json"
  before = marker.stat().st_mtime_ns
  assert bootstrap.bootstrap(config, str(tmp_path)) == results
  assert marker.stat().st_mtime_ns == before
