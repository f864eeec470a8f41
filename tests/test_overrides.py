"""Config keys as text: types, misspelt names, sections."""

import pytest
from ml_collections import config_dict

from blip_jax.runtime import overrides
from blip_jax.runtime.command import UsageError
from blip_jax.runtime.config import Config
from tests import short_runs


@pytest.fixture
def config():
  return Config(
    dict(
      steps=1,
      rate=0.5,
      flip=True,
      name="a",
      drop=config_dict.placeholder(float),
      part=dict(
        files=("",), weights=(1.0, 2.0), sizes=(1, 2), anything=(), rate=0.1
      ),
    )
  ).lock()


@pytest.mark.parametrize(
  "key, texts, value",
  [
    ("steps", ["3"], 3),
    ("steps", ["3", "4"], 4),
    ("rate", ["1e-4"], 1e-4),
    ("rate", ["2"], 2.0),
    ("flip", ["False"], False),
    ("flip", ["1"], True),
    ("flip", ["t"], True),
    ("name", [""], ""),
    ("name", ["(1, 2)"], "(1, 2)"),
    ("drop", ["0.25"], 0.25),
    ("part.rate", ["-0.5"], -0.5),
    ("part.files", ["a.json"], ("a.json",)),
    ("part.files", ["a.json", "b.json"], ("a.json", "b.json")),
    ("part.files", ["('a.json', 'b c.json')"], ("a.json", "b c.json")),
    ("part.files", ["2024"], ("2024",)),
    ("part.files", ["a, b.json"], ("a, b.json",)),
    ("part.files", ["(1).json"], ("(1).json",)),
    ("part.files", ["cc12m/{0..3}.tar"], ("cc12m/{0..3}.tar",)),
    ("part.files", ["()"], ()),
    ("part.files", [""], ("",)),
    ("part.weights", ["(1, 2.5)"], (1.0, 2.5)),
    ("part.weights", ["0.5", "3"], (0.5, 3.0)),
    ("part.sizes", ["(3,)"], (3,)),
    ("part.anything", ["x"], ("x",)),
    ("part.anything", ["(0.5, 1)"], (0.5, 1)),
  ],
)
def test_texts_become_values_of_the_type(config, key, texts, value):
  overrides.override(config, key, texts)
  found = overrides.leaves(config)[key]
  assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
  "key, text, expected",
  [
    ("steps", "abc", "an integer"),
    ("steps", "1.5", "an integer"),
    ("steps", "", "an integer"),
    ("rate", "fast", "a number"),
    ("drop", "x", "a number"),
    ("flip", "yes", "true or false"),
    ("part.weights", "x", "values such as (1.0, 2.0)"),
    ("part.weights", "('a', 'b')", "values such as (1.0, 2.0)"),
    ("part.sizes", "(1.5,)", "values such as (1, 2)"),
    ("part.files", "(1, 2)", "values such as ('',)"),
  ],
)
def test_a_wrong_type_says_key_expected_and_found(config, key, text, expected):
  with pytest.raises(UsageError) as error:
    overrides.override(config, key, [text])
  assert (
    str(error.value) == f"--config.{key}: expected {expected}, found {text!r}"
  )


@pytest.mark.parametrize(
  "wrong, right",
  [
    ("lr", ["optim.lr"]),
    ("optim.learning_rate", ["optim.lr"]),
    ("learning_rate", ["optim.lr"]),
    ("wd", ["optim.weight_decay"]),
    ("optim.warmup_stesp", ["optim.warmup_steps"]),
    ("batchsize", ["batch_size", "evals.batch_size"]),
    ("BatchSize", ["batch_size", "evals.batch_size"]),
    ("data.tain", ["data.train"]),
    ("dta.train", ["data.train"]),
    ("train", ["data.train"]),
    ("steps", ["num_steps"]),
    ("epochs", ["num_epochs"]),
    ("image_size", ["model.image_size"]),
    ("dtype", ["model.dtype"]),
    ("queue", ["pretrain.queue_size"]),
    ("model.queue_size", ["pretrain.queue_size"]),
    ("evals.vall.source", ["evals.val.source"]),
    ("batch_size.x", []),
    ("zzz", []),
  ],
)
def test_a_misspelt_key_names_the_nearest(wrong, right):
  config = short_runs.load_config("pretrain_custom")
  keys = overrides.leaves(config)
  assert overrides.nearest(wrong, keys) == right
  with pytest.raises(UsageError) as error:
    overrides.override(config, wrong, ["1"])
  assert f"--config.{wrong}: there is no such key" in str(error.value)
  for key in right:
    assert f"--config.{key}" in str(error.value)


def test_a_section_lists_its_keys(config):
  with pytest.raises(UsageError, match=r"part is a section.*part\.weights"):
    overrides.override(config, "part", ["{}"])


def test_switches_are_those_that_are_true_or_false(config):
  assert overrides.is_switch(config, "flip")
  assert not overrides.is_switch(config, "part.rate")
  with pytest.raises(UsageError):
    overrides.is_switch(config, "flop")
