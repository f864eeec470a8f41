"""Table 1 in miniature: how it is measured, and that all of it runs."""

import json

import pytest
from blip_jax.configs import bootstrap as bootstrap_recipe
from blip_jax.configs import capfilt_paper

from blip_jax import defaults
from blip_jax.capfilt import bootstrap
from blip_jax.data import scenes
from tests import jobs

SPEC = "scenes:train?num=10&noise=0.4&junk=web"


def test_labels_are_compared_with_the_truth(tmp_path):
  source = scenes.Scenes("train", num=10, noise=0.4, junk="web")
  config = defaults.capfilt().lock()
  config.update(source=(SPEC,), out=str(tmp_path))
  texts, is_wrong = [], []
  for n in range(10):
    record = source[n]
    is_wrong.append(bool(record["noise"]))
    # The filter keeps the first two web texts, and the first five captions.
    # Every second caption is correct.
    web = ("web", 0.9 if n < 2 else 0.1, record["caption"])
    caption = record["references"][0] if n % 2 else "a blue elephant"
    texts.append([web, ("synthetic", 0.8 if n < 5 else 0.2, caption)])
  jobs.write_capfilt_job(config.out, config, {"scenes-train-00000": texts})
  results = bootstrap.compare(config.out)
  num_wrong, num_kept_wrong = sum(is_wrong), sum(is_wrong[:2])
  assert 0 < num_wrong < 10
  assert results == pytest.approx(
    {
      "filter/wrong_removed": 100 * (num_wrong - num_kept_wrong) / num_wrong,
      "filter/right_kept": 100 * (2 - num_kept_wrong) / (10 - num_wrong),
      "captioner/right": 50,
      "captioner/right_of_kept": 40,
      "texts/noise": 10 * num_wrong,
      "texts/web_kept": 2,
      "texts/synthetic_kept": 5,
    }
  )


def test_labels_that_changed_are_not_compared(tmp_path):
  config = defaults.capfilt().lock()
  config.update(source=("scenes:train?num=1",), out=str(tmp_path))
  texts = {"scenes-train-00000": [[("web", 0.9, "a")]]}
  jobs.write_capfilt_job(config.out, config, texts)
  (path,) = tmp_path.glob("*.parquet")
  other = tmp_path / "other"
  texts = {"scenes-train-00000": [[("web", 0.1, "a")]]}
  jobs.write_capfilt_job(str(other), config, texts)
  (other / path.name).replace(path)
  with pytest.raises(ValueError, match="1 of 1 work units"):
    bootstrap.compare(config.out)


def test_the_table_has_means_and_ranges():
  names = [f"{r}/{m}" for r in bootstrap.RUNS for m in bootstrap.METRICS]
  names += ["filter/wrong_removed", "filter/right_kept", "captioner/right"]
  names += ["captioner/right_of_kept"]
  by_seed = {seed: dict.fromkeys(names, 10.0 * seed) for seed in (1, 2, 6)}
  text = bootstrap.table(by_seed)
  assert text.count("| 30.0 (10.0-60.0) |") == 4 * 2
  assert "Means of 3 seeds" in text
  assert text.count("- filter/wrong_removed: 30.0 (10.0-60.0)") == 1


def test_the_settings_of_the_paper():
  config = capfilt_paper.get_config().lock()
  assert config.threshold == config.merge.threshold == 0.5
  assert config.generation.sample
  assert config.generation.top_p == 0.9
  assert config.generation.num_return_sequences == 1
  assert config.captioner != config.filter


@pytest.mark.slow
def test_the_experiment_runs_and_leaves_its_results(tmp_path):
  """With too few steps for meaningful numbers."""
  config = bootstrap_recipe.get_config().lock()
  config.seeds = (0,)
  config.web, config.clean = SPEC + "&seed={seed}", "scenes:train?num=32"
  for name, steps in (("pretrain", 20), ("captioner", 4), ("filter", 4)):
    config[name].update(num_steps=steps, log_every_steps=2)
    config[name].optim.warmup_steps = 2
    config[name].evals.test.source = "scenes:test?num=20"
  config.capfilt.threshold = 0.2
  results = bootstrap.bootstrap(config, str(tmp_path))
  written = json.loads((tmp_path / "results.json").read_text())
  for name in (f"{r}/{m}" for r in bootstrap.RUNS for m in bootstrap.METRICS):
    assert written[name] == written[f"{name}/seed_0"] == results[name]
  assert {"filter/wrong_removed", "filter/right_kept"} < written.keys()
  assert (tmp_path / "table.md").read_text().startswith("| bootstrapped by |")
  # Finished stages are not repeated.
  marker = tmp_path / "seed_0" / "both" / "results.json"
  before = marker.stat().st_mtime_ns
  assert bootstrap.bootstrap(config, str(tmp_path)) == results
  assert marker.stat().st_mtime_ns == before


def test_every_run_has_its_own_training_set(tmp_path, monkeypatch):
  """Without training: which stage starts from what, and learns from what."""
  trained, merged = {}, {}

  def train(config, folder):
    name = folder.rpartition("/")[2]
    trained[name] = (config.data.train, config.init.weights, config.seed)
    return {
      f"test/{metric}": float(len(trained)) for metric in bootstrap.METRICS
    }

  def label(config, folder):
    assert (config.source, config.seed, config.out) == (
      ("noisy?seed=7",),
      7,
      folder,
    )
    assert config.captioner.endswith("seed_7/captioner_model")
    assert config.filter.endswith("seed_7/filter_model")

  def merge(config, folder):
    name = config.merge.out.rpartition("/")[2]
    merged[name] = (config.merge.threshold, config.merge.sources)

  monkeypatch.setattr(bootstrap.train, "train", train)
  monkeypatch.setattr(bootstrap.job, "run", label)
  monkeypatch.setattr(bootstrap.merge, "merge", merge)
  monkeypatch.setattr(bootstrap, "compare", lambda _: {"filter/x": 1.0})
  config = bootstrap_recipe.get_config().lock()
  config.seeds, config.capfilt.threshold = (7,), 0.3
  config.web, config.clean = "noisy?seed={seed}", "clean?seed={seed}"
  results = bootstrap.bootstrap(config, str(tmp_path))
  folder = tmp_path / "seed_7"
  assert merged == {
    "filter": (0.3, ("web",)),
    "captioner": (0.0, ("web", "synthetic")),
    "both": (0.3, ("web", "synthetic")),
  }
  pretrained = str(folder / "none")
  assert trained == {
    "none": (("noisy?seed=7",), "", 7),
    "captioner_model": (("clean?seed=7",), pretrained, 7),
    "filter_model": (("clean?seed=7",), pretrained, 7),
    **{
      name: ((f"{folder}/sets/{name}/*.tar",), "", 7)
      for name in ("filter", "captioner", "both")
    },
  }
  assert results["filter/x"] == results["filter/x/seed_7"] == 1
  assert [results[f"{name}/txt_r1"] for name in bootstrap.RUNS] == [1, 4, 5, 6]
  # A stage that is finished, or a set that is there, is not made again.
  (folder / "results.json").unlink()
  (folder / "sets" / "filter").mkdir(parents=True)
  trained.clear()
  merged.clear()
  assert bootstrap.bootstrap(config, str(tmp_path)) == results
  assert not trained and set(merged) == {"captioner", "both"}


def test_shares_of_nothing_are_zero():
  assert bootstrap._percent(0, 0) == 0
  assert bootstrap._percent(1, 4) == 25
