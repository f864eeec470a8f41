"""Recipes at a size at which two steps take seconds."""

import ast
import importlib.util
import pathlib
import re
import shlex

import jax
import pytest

from blip_jax import (
  train,
)
from blip_jax.cli import command_line
from blip_jax.models import config
from blip_jax.runtime import config as run_config
from blip_jax.runtime import overrides, sharding
from blip_jax.tasks import pretrain

ROOT = pathlib.Path(__file__).resolve().parent.parent


def load_config(name):
  """Returns the config of a recipe."""
  path = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config().lock()


def docstring_commands(path):
  """The arguments of the commands in a file's docstring, as `main` has them."""
  doc = ast.get_docstring(ast.parse(path.read_text()))
  lines = re.findall(r"^  python -m blip_jax\.main (.*)$", doc, re.MULTILINE)
  return [shlex.split(line) for line in lines]


def shrunk_command(name):
  """The command of a recipe's docstring, as `main` runs it, but shrunk."""
  words, *_ = docstring_commands(ROOT / "configs" / f"{name}.py")
  line = command_line.parse(words)
  keys = {word.removeprefix("--config.").partition("=")[0] for word in words}
  shrink(line.config, keys & overrides.leaves(line.config).keys())
  return line


def shrunk_config(name):
  """Returns a recipe on Scenes, at a size where two steps take seconds."""
  return shrink(load_config(name))


def shrink(config, given=()):
  """Makes two steps of a training config take seconds.

  Args:
    config: which is changed and returned.
    given: keys that keep their values; other sources become Scenes.
  """
  given = {key: overrides.leaves(config)[key] for key in given}
  config.batch_size = 16
  config.num_steps = 2
  config.log_every_steps = 1
  config.tokenizer = "scenes"
  config.model.image_size = 16
  if config.model.variant == "base" or config.task != "caption":
    # Recipes in bfloat16 and with recomputation take twice as long to compile
    # on a CPU, so only the large captioner keeps them.
    config.model.dtype, config.model.vit_remat = "float32", "none"
  config.model.variant = "tiny"
  # The largest mesh axis that two devices allow.
  config.mesh.fsdp = min(config.mesh.fsdp, 2)
  if config.task == "pretrain":
    # Programs with the same constants are compiled only once.
    config.pretrain.update(pretrain.defaults().pretrain)
    config.data.max_length = 18
  if config.task in ("pretrain", "retrieval"):
    config[config.task].queue_size = 24
  if config.task == "vqa":
    config.vqa.max_answers, config.vqa.answer_list = 2, "scenes"
    config.data.max_length = 12
  if config.task == "nlvr":
    config.data.max_length = 18
  if config.task == "dialog":
    config.data.max_length, config.dialog.context_length = 36, 9
  config.optim.lr, config.optim.min_lr, config.optim.warmup_lr = 1e-3, 1e-5, 0.0
  config.optim.decay_rate, config.optim.betas = 0.9, (0.9, 0.98)
  if config.task == "retrieval":
    config.evals.test.source = ""
  config.init.weights = ""
  config.data.train = ("scenes:train?num=64",)
  if config.data.rotate:
    config.data.rotate = ""
  config.data.num_workers = 0
  config.optim.warmup_steps = 1
  config.optim.steps_per_epoch = 1
  config.evals.every_steps = 0
  config.evals.batch_size = 16
  for split in run_config.splits(config).values():
    split.source, split.image_root = "scenes:val?num=24", ""
  config.update_from_flattened_dict(given)
  return config


def make_quick(monkeypatch):
  """Two devices and two layers; `test_mesh.py` is about eight devices."""
  make_mesh, two = sharding.make_mesh, jax.devices()[:2]
  monkeypatch.setattr(sharding, "make_mesh", lambda c, *_: make_mesh(c, two))
  tiny = config.VARIANTS["tiny"]
  shallow = {
    "vit": {**tiny["vit"], "depth": 1},
    "med": {**tiny["med"], "depth": 1},
  }
  monkeypatch.setitem(config.VARIANTS, "tiny", {**tiny, **shallow})


def write_pretrained(workdir):
  """Returns a workdir after two steps of the quick start."""
  config = shrunk_config("quickstart")
  config.evals.scenes_val.source = ""
  with pytest.MonkeyPatch.context() as monkeypatch:
    make_quick(monkeypatch)
    train.train(config, str(workdir))
  return workdir
