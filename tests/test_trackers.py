"""Weights & Biases and trackio get what metrics.jsonl has."""

import json
import sys
import types

import pytest

from blip_jax.runtime import config as run_config
from blip_jax.runtime import metrics, trackers
from blip_jax.tasks import caption


class Library(types.ModuleType):
  """What a tracker's library is asked for."""

  def __init__(self, name):
    super().__init__(name)
    self.calls = []

  def __getattr__(self, name):
    if name.startswith("__"):
      raise AttributeError(name)
    return lambda *args, **options: self.calls.append((name, args, options))


@pytest.fixture
def library(monkeypatch):
  def use(name):
    monkeypatch.setitem(sys.modules, name, found := Library(name))
    monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    return found

  return use


def write(workdir, name, first_step=0):
  writer = metrics.MetricWriter(
    workdir, first_step, lambda: trackers.Tracker(name, workdir, {"seed": 42})
  )
  writer.write(first_step + 1, {"train/loss": 2})
  writer.close()


def test_a_run_goes_on_in_wandb_with_the_step_as_a_metric(library, tmp_path):
  wandb = library("wandb")
  for first_step in (0, 1):
    write(tmp_path / "run", "wandb", first_step)
  inits = [options for name, _, options in wandb.calls if name == "init"]
  assert inits[0] == inits[1] and len(inits[0]["id"]) == 16
  assert inits[0]["name"] == "run" and inits[0]["project"] == "blip_jax"
  assert inits[0]["config"] == {"seed": 42} and inits[0]["resume"] == "allow"
  assert wandb.calls[1:4] == [
    ("define_metric", ("*",), {"step_metric": "step"}),
    ("log", ({"step": 1, "train/loss": 2.0},), {}),
    ("finish", (), {}),
  ]


def test_trackio_is_told_the_step(library, tmp_path, monkeypatch):
  trackio = library("trackio")
  monkeypatch.setenv("TRACKIO_PROJECT", "mine")
  write(tmp_path, "trackio")
  names = [name for name, _, _ in trackio.calls]
  assert names == ["init", "log", "finish"]
  assert trackio.calls[0][2]["project"] == "mine"
  assert trackio.calls[1][1:] == (({"train/loss": 2.0},), {"step": 1})


def test_only_the_first_process_has_one(library, tmp_path, monkeypatch):
  wandb = library("wandb")
  monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
  write(tmp_path, "wandb")
  assert not wandb.calls


def test_a_library_that_lacks_or_refuses_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ImportError, match=r"config.tracker=wandb .*\[tracking\]"):
    write(tmp_path, "wandb")

  def refuse(**_):
    raise RuntimeError("no API key")

  refusing = types.SimpleNamespace(init=refuse)
  monkeypatch.setitem(sys.modules, "wandb", refusing)
  with pytest.raises(ValueError, match=r"no API key\. Log in .*WANDB_MODE"):
    write(tmp_path, "wandb")


def test_other_names_are_refused():
  config = caption.defaults()
  config.data.train = ("a.json",)
  config.tracker = "mlflow"
  with pytest.raises(ValueError, match=r"config\.tracker: .*trackio.*mlflow"):
    run_config.validate(config)


def test_the_real_wandb_offline(tmp_path, monkeypatch):
  pytest.importorskip("wandb", reason="needs the extra [tracking]")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_DIR", str(tmp_path))
  monkeypatch.setenv("WANDB_SILENT", "true")
  write(tmp_path / "run", "wandb")
  assert [*tmp_path.glob("wandb/offline-run-*/*.wandb")]


def test_the_real_trackio_on_this_machine(tmp_path, monkeypatch):
  pytest.importorskip("trackio", reason="needs the extra [tracking]")
  monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
  write(tmp_path / "run", "trackio")
  row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
  assert row == {"step": 1, "train/loss": 2.0}
