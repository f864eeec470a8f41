"""Checks of a config, and the numbers that it leaves to the data."""

import pytest

from blip_jax.runtime import config as run_config
from blip_jax.tasks import caption, retrieval


def make(**changes):
  config = retrieval.defaults()
  config.data.train = ("train.json",)
  for key, value in changes.items():
    place, _, name = f"_.{key}".rpartition("__")
    target = config
    for part in place.removeprefix("_.").split("__"):
      target = target[part] if part else target
    target[name.removeprefix("_.")] = value
  return config


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"job": "evaluate", "data__train": ()},
    {"data__train": (), "data__rotate": "laion/*.json"},
    {"scope": "local"},
    {"model__dtype": "float32"},
    {"batch_size": 1, "log_every_steps": 1, "checkpoint__every_steps": 1},
    {"evals__batch_size": 1, "data__max_words": 1},
    {"evals__checkpoint": "best"},
    {"evals__checkpoint": "12"},
    {"evals__best": ("test/r_mean", "val/txt_r1")},
    {"evals__best": ()},
  ],
)
def test_possible_configs_are_accepted(changes):
  run_config.validate(make(**changes))


@pytest.mark.parametrize(
  "changes, key",
  [
    ({"job": "eval"}, r"config\.job"),
    ({"scope": "all"}, r"config\.scope"),
    ({"model__dtype": "float16"}, r"config\.model\.dtype"),
    ({"batch_size": 0}, r"config\.batch_size: expected at least 1, found 0"),
    ({"log_every_steps": 0}, r"config\.log_every_steps"),
    ({"profile": (0, 2)}, r"config\.profile: .* \(10, 12\), found \(0, 2\)"),
    ({"profile": (3, 2)}, r"config\.profile"),
    ({"profile": (3,)}, r"config\.profile"),
    ({"profile": ("a", "b")}, r"config\.profile: .*, found \('a', 'b'\)"),
    ({"profile": (1.5, 2)}, r"config\.profile: .*, found \(1\.5, 2\)"),
    ({"checkpoint__every_steps": 0}, r"config\.checkpoint\.every_steps"),
    ({"evals__batch_size": 0}, r"config\.evals\.batch_size"),
    ({"data__max_words": 0}, r"config\.data\.max_words"),
    ({"evals__checkpoint": "last"}, r"config\.evals\.checkpoint"),
    ({"evals__checkpoint": "-1"}, r"config\.evals\.checkpoint"),
    ({"evals__best": ("dev/r_mean",)}, r"\['test', 'val'\], found 'dev/r_mean"),
    ({"evals__best": ("batch_size/a",)}, r"config\.evals\.best"),
    ({"data__train": ("",)}, r"config\.data\.train: no source"),
    ({"data__train": ()}, r"config\.data\.train: no source"),
  ],
)
def test_impossible_configs_are_refused_by_key(changes, key):
  with pytest.raises(ValueError, match=key):
    run_config.validate(make(**changes))


@pytest.mark.parametrize(
  "changes, rows, steps_per_epoch, num_steps",
  [
    # The last rows of an epoch do not fill a batch.
    ({"batch_size": 32, "num_epochs": 2.0}, 100.0, 3, 6),
    ({"batch_size": 50, "num_epochs": 2.0}, 100.0, 2, 4),
    ({"batch_size": 101, "num_epochs": 3.0}, 100.0, 1, 3),
    ({"batch_size": 10, "num_epochs": 0.25}, 100.0, 10, 2),
    ({"batch_size": 10, "num_epochs": 0.36}, 100.0, 10, 4),
    ({"batch_size": 10, "num_steps": 7}, 100.0, 10, 7),
    (
      {"batch_size": 10, "num_epochs": 2.0, "optim__steps_per_epoch": 4},
      100.0,
      4,
      8,
    ),
    ({"batch_size": 10, "num_steps": 1, "num_epochs": 0.0}, 100.0, 10, 1),
  ],
)
def test_steps_follow_from_the_data(changes, rows, steps_per_epoch, num_steps):
  config = make(**changes)
  before = config.to_json()
  found = run_config.with_steps(config, rows)
  assert found.optim.steps_per_epoch == steps_per_epoch
  assert found.num_steps == num_steps
  assert config.to_json() == before


def test_a_run_needs_steps_or_epochs():
  with pytest.raises(ValueError, match=r"config\.num_steps: .* found 0"):
    run_config.with_steps(make(num_epochs=0.0), 1000.0)


@pytest.mark.parametrize(
  "schedule, num_steps, asked, warmup_steps",
  [
    ("cosine", 100, 99, 99),
    ("cosine", 100, 100, 10),
    ("cosine", 100, 3000, 10),
    ("cosine", 9, 9, 0),
    ("step", 100, 100, 10),
    ("cosine_epoch", 100, 3000, 3000),
  ],
)
def test_a_run_shorter_than_its_warm_up_gets_a_shorter_one(
  schedule, num_steps, asked, warmup_steps
):
  config = make(
    num_steps=num_steps, optim__schedule=schedule, optim__warmup_steps=asked
  )
  found = run_config.with_steps(config, 1000.0)
  assert found.optim.warmup_steps == warmup_steps


def test_splits_without_a_source_are_left_out():
  config = make(evals__val__source="val.json")
  assert list(run_config.splits(config)) == ["val"]
  config.evals.test.source = "test.json"
  assert sorted(run_config.splits(config)) == ["test", "val"]


def test_only_some_tasks_have_a_prompt():
  assert run_config.prompt(make()) == ""
  config = caption.defaults()
  config.caption.prompt = "a photo of "
  assert run_config.prompt(config) == "a photo of "
