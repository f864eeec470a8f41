"""Comments in the files of a config are found by the complete names of keys."""

import re

import pytest

from blip_jax.cli import key_comments, recipes
from blip_jax.runtime import overrides

LIBRARY = """
from blip_jax.runtime.config import Config

def split(source):
  return Config(dict(
    source=source,
    samples=0,  # images to show
  ))

def ranked(source):
  config = split(source)
  # How many are ranked again; 0: none.
  config.k = 0
  return config

def base():
  return Config(
    dict(
      rate=0.1,  # of learning
      # Above and over
      # two lines.
      steps=(
        1,
        2,
      ),  # behind its end
      mesh=dict(data=1, fsdp=2),  # of devices
      optim=dict(
        rate=0.2,  # of the optimiser
        deep=dict(rate=0.3),
      ),
      plain=1,
      # Of nothing below: an empty line follows.

      far=2,
    )
  )

def tiny(section):
  section.rate = 1  # tiny
"""

MINE = """
import library
from library import base, tiny

def get_config():
  config = base()
  config.first = library.ranked("a")
  config.second = library.ranked("b")  # the second
  for name in ("first", "second"):
    part = config[name]
    part.samples = 3  # of both
  config.optim.rate = 0.5  # faster
  config.plain = config.rate
  tiny(config.optim.deep)
  config.extra = dict(**{"no": 1}, rate=4)
  # Both at once.
  config.extra.rate = config.far = 5
  return config
"""

EXPECTED = {
  "rate": "of learning",
  "steps": "Above and over two lines. behind its end",
  "mesh": "of devices",
  "mesh.data": "",
  "optim.rate": "of the optimiser; faster",
  "optim.deep.rate": "tiny",
  "plain": "",
  "far": "Both at once.",
  "extra.rate": "Both at once.",
  "first.source": "",
  "first.samples": "images to show; of both",
  "first.k": "How many are ranked again; 0: none.",
  "second": "the second",
  "second.samples": "images to show; of both",
  "second.k": "How many are ranked again; 0: none.",
  "third.k": "",
  "samples": "",
}


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
  folder = tmp_path_factory.mktemp("configs")
  (folder / "library.py").write_text(LIBRARY)
  (folder / "mine.py").write_text(MINE)
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.syspath_prepend(str(folder))
    return key_comments.of_file(str(folder / "mine.py"))


@pytest.mark.parametrize("key", EXPECTED)
def test_comments_of_a_config_and_its_libraries(notes, key):
  assert notes.of(key) == EXPECTED[key]


def test_a_file_without_comments(tmp_path):
  (tmp_path / "mine.py").write_text("def get_config():\n  return None\n")
  assert key_comments.of_file(str(tmp_path / "mine.py")).of("x") == ""


def definitions(text):
  """(last name of the key, comment behind it) of lines such as `lr=1,  # c`
  and `config.optim.lr = 1  # c`."""
  return re.findall(
    r"^ +(?:[\w.]+\.)?(\w+) ?= ?[^#=\n][^#\n]*  # (.+)$", text, re.MULTILINE
  )


@pytest.mark.parametrize("name", recipes.names())
def test_every_comment_of_a_recipe_and_its_defaults_is_shown(name, root):
  """Written another way than the code under test: by lines, not by syntax."""
  config = recipes.load(name)
  notes = key_comments.of_file(recipes.path_of(name))
  keys = [*overrides.leaves(config)]
  said = {key: notes.of(key) for key in keys}
  found = definitions((root / "configs" / f"{name}.py").read_text())
  if "task" in config:
    task = root / "blip_jax" / "tasks" / f"{config.task}.py"
    shared = (root / "blip_jax" / "defaults.py").read_text()
    shared = shared.split("def training(")[1].split("\ndef use_paper")[0]
    found += definitions(shared) + definitions(
      task.read_text().split("def defaults(")[1].split("\ndef ")[0]
    )
    assert len(found) > 20
  for leaf, comment in found:
    known = [key for key in keys if key.rpartition(".")[2] == leaf]
    if known:
      assert any(comment in said[key] for key in known), (leaf, comment)


def test_equal_names_in_different_sections_do_not_mix():
  notes = key_comments.of_file(recipes.path_of("caption_folder"))
  assert "of all devices" in notes.of("batch_size")
  assert notes.of("evals.batch_size") != notes.of("batch_size")
  assert "only at the end" in notes.of("evals.every_steps")
  assert "only at the end" not in notes.of("checkpoint.every_steps")
