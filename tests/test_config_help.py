"""`--help` lists recipes and jobs, and the keys of a config."""

import re

import pytest

from blip_jax import (
  main,
)
from blip_jax.cli import config_help, key_comments, recipes
from blip_jax.runtime import overrides


def shown(*words):
  return config_help.text(words, main.JOBS)


def test_help_lists_flags_recipes_and_jobs():
  text = shown("--help")
  for flag in ("--config", "--workdir", "--distributed", "--help"):
    assert f"\n  {flag} " in text
  for name in recipes.names():
    assert f"\n  {name} " in text
    first, *_ = recipes.summary(name).split()
    assert f"{name} " in text and first in text
  for job in main.JOBS:
    assert f"\n  {job} " in text
  assert max(map(len, text.splitlines())) <= 100


def test_help_of_a_config_is_aligned():
  lines = shown("--config=quickstart", "--help").splitlines()
  (size,) = [line for line in lines if line.startswith("  batch_size ")]
  (steps,) = [line for line in lines if line.startswith("  num_steps ")]
  assert size.split()[1] == "16" and steps.split()[1] == "2000"
  assert size.index("16") == steps.index("2000")
  assert size.index("of all devices") == steps.index("0: given by num_epochs")
  assert lines[0].startswith("quickstart: A BLIP in minutes")


@pytest.mark.parametrize("name", recipes.names())
def test_every_key_is_shown_with_value_and_comment(name):
  text = " ".join(shown(f"--config={name}", "--help").split())
  notes = key_comments.of_file(recipes.path_of(name))
  for key, value in overrides.leaves(recipes.load(name)).items():
    row = f" {key} {'unset' if value is None else repr(value)}"
    assert f"{row} {notes.of(key)}".rstrip() in text, key
  assert max(map(len, shown(f"--config={name}").splitlines())) <= 100


@pytest.mark.parametrize(
  "words",
  [
    ("--help", "--config", "quickstart"),
    ("--config", "quickstart", "-h"),
    ("--config=quickstart", "--helpfull"),
    ("--config", recipes.path_of("quickstart"), "--help"),
  ],
)
def test_help_is_asked_for_in_any_order(words, capsys):
  assert main.run(words) == 0
  assert "optim.lr " in capsys.readouterr().out


def test_help_shows_the_values_of_the_flags():
  text = shown("--config=quickstart", "--config.seed=77", "--help")
  assert re.search(r"^  seed +77( |$)", text, re.M)


def test_help_of_a_wrong_config_is_a_mistake(capsys):
  assert main.run(["--config=quickstrat", "--help"]) == 2
  assert "Did you mean 'quickstart'?" in capsys.readouterr().err
