"""Config keys as users name them: misspelt names, sections."""

import pytest

from blip_jax.runtime import overrides
from blip_jax.runtime.command import UsageError
from blip_jax.runtime.config import Config
from tests import short_runs


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
    overrides.check_key(config, wrong)
  assert f"--config.{wrong}: there is no such key" in str(error.value)
  for key in right:
    assert f"--config.{key}" in str(error.value)


def test_a_section_lists_its_keys():
  config = Config(dict(part=dict(files=("",), weights=(1.0, 2.0)))).lock()
  with pytest.raises(UsageError, match=r"part is a section.*part\.weights"):
    overrides.check_key(config, "part")
