"""The table of tasks, and what a new task has to bring."""

import dataclasses
import json
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from blip_jax import defaults, task_table, train
from blip_jax.models import families
from blip_jax.runtime import saved_arrays, sharding, snapshot
from blip_jax.tasks import base


@pytest.mark.parametrize("name", task_table.TASKS)
def test_every_task_trains_a_known_family(name):
  task = task_table.TASKS[name].file
  assert task.FAMILY in families.FAMILIES
  config = task.defaults()
  assert config.task == name
  assert name in config
  assert task_table.of(config).file is task


def test_an_unknown_task_is_refused():
  config = task_table.TASKS["caption"].file.defaults()
  config.task = "captoin"
  with pytest.raises(ValueError, match=r"config\.task: .*'caption'.*'captoin'"):
    task_table.of(config)


@dataclasses.dataclass(frozen=True)
class MeanPixel(base.WithoutMomentum):
  """A toy task: predicts the mean of an image's pixels by a constant."""

  model: nn.Module
  bias: float

  def init(self, rng):
    projection = {"kernel": jnp.zeros((1, 1)), "bias": jnp.full(1, self.bias)}
    return {"text_proj": projection}

  def loss(self, params, momentum, batch, *, rng, step, train=True):
    target = base.pixels(batch).mean(axis=(1, 2, 3))
    predicted = params["text_proj"]["bias"] + params["text_proj"]["kernel"][0]
    loss = jnp.mean((predicted - target) ** 2)
    return loss, (None, {"loss": loss})


class Bias:
  """A toy evaluator, which reports the learned constant."""

  def run(self, state):
    yield "bias", float(state.params["text_proj"]["bias"][0])


def toy_defaults():
  config = defaults.training("mean_pixel")
  config.mean_pixel = dict(bias=3.0)
  config.evals.val = defaults.split("scenes:val?num=4")
  return config


def toy_check(config):
  if config.mean_pixel.bias < 0:
    raise ValueError(f"config.mean_pixel.bias: {config.mean_pixel.bias} < 0")


# As much as `tasks.base.TaskFile` lists, and no more.
TOY = types.SimpleNamespace(
  FAMILY="feature",
  defaults=toy_defaults,
  check=toy_check,
  example=lambda config, tokenizer, image: base.pair_example(
    config, tokenizer, image
  ),
  make=lambda config, model, *, prompt_length, num_shards: MeanPixel(
    model, config.mean_pixel.bias
  ),
)


def make_toy_config():
  config = TOY.defaults()
  config.batch_size = 4
  config.num_steps = config.optim.steps_per_epoch = 2
  config.log_every_steps = 1
  config.optim.warmup_steps = 0
  config.optim.lr = 0.1
  config.tokenizer = "scenes"
  config.model.variant = "tiny"
  config.model.image_size = 16
  config.data.train = ("scenes:train?num=8",)
  return config


@pytest.fixture
def with_toy(monkeypatch):
  """A line of the table is all that a new task changes."""
  entry = task_table.Entry(TOY, lambda context: [Bias()])
  monkeypatch.setitem(task_table.TASKS, "mean_pixel", entry)
  make_mesh, two = sharding.make_mesh, jax.devices()[:2]
  monkeypatch.setattr(sharding, "make_mesh", lambda c, *_: make_mesh(c, two))


def test_a_new_task_trains(with_toy, tmp_path):
  results = train.train(make_toy_config(), str(tmp_path))
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  logged = [json.loads(line) for line in lines]
  first, second = (x["train/loss"] for x in logged if "train/loss" in x)
  assert second < first
  assert results == {"val/bias": pytest.approx(2.8, abs=0.1)}
  assert json.loads((tmp_path / "results.json").read_text()) == results
  saved = saved_arrays.load_to_host(snapshot.find(tmp_path), "params")
  assert saved["text_proj"]["bias"] == pytest.approx(results["val/bias"])
  card = snapshot.find(tmp_path) / "model" / "model.json"
  assert json.loads(card.read_text())["family"] == "feature"


def test_checks_of_a_new_task_are_made_at_start(with_toy, tmp_path):
  config = make_toy_config()
  config.mean_pixel.bias = -1.0
  with pytest.raises(ValueError, match=r"config\.mean_pixel\.bias"):
    train.train(config, str(tmp_path))
