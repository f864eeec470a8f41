"""Commands in docstrings are executed; test_train.py has those that train."""

import ast
import json
import pathlib
import re

import pytest
from blip_jax.tools import (
  convert_checkpoint,
  inspect_checkpoint,
  score_captions,
)
from blip_jax.tools.bench import __main__ as bench
from blip_jax.tools.bench import conversion, results

from blip_jax import (
  main,
)
from blip_jax.cli import command_line, recipes
from blip_jax.data import folders
from blip_jax.inference import loading
from blip_jax.runtime import sharding
from tests import helpers, jobs, short_runs

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMANDS = [
  (name, words)
  for name in recipes.names()
  for words in short_runs.docstring_commands(ROOT / "configs" / f"{name}.py")
]


@pytest.fixture
def user(tmp_path, monkeypatch):
  """A reader's folder, in which commands run; and small models."""
  helpers.write_pairs(tmp_path)
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  for number in range(2):
    for shards in ("shards", "cc12m"):
      (tmp_path / shards).mkdir(exist_ok=True)
      members = jobs.scene_members(5 * number, 5)
      jobs.write_tar(tmp_path / shards / f"{number:05d}.tar", members)
  monkeypatch.chdir(tmp_path)
  mesh = sharding.one_device()
  monkeypatch.setattr(sharding, "make_mesh", lambda *_: mesh)
  monkeypatch.setattr(main, "prepare_process", lambda: None)

  def load(name, task="caption", mesh=mesh, **_):
    return jobs.load_tiny("one", task, mesh)

  monkeypatch.setattr(loading, "load", load)
  return tmp_path


@pytest.mark.parametrize("name, words", COMMANDS)
def test_commands_of_recipes_are_understood(user, name, words):
  line = command_line.parse(words)
  assert pathlib.Path(line.recipe) == pathlib.Path("configs") / f"{name}.py"
  main.check_job(line.config.job, line.own.job)
  assert pathlib.Path(line.workdir).is_relative_to(user)


def test_every_recipe_shows_its_command():
  assert [*dict(COMMANDS)] == recipes.names()
  texts = [path.read_text() for path in (ROOT / "configs").glob("*.py")]
  found = sum(len(re.findall(r"python -m blip_jax", text)) for text in texts)
  assert found == len(COMMANDS)


def commands(name):
  return [words for known, words in COMMANDS if known == name]


def test_the_command_that_captions_images(user):
  (words,) = commands("caption_images")
  assert main.run(words) == 0
  lines = (user / "captions.jsonl").read_text().splitlines()
  ids = [json.loads(line)["id"] for line in lines]
  assert len(ids) == 16 and all(folders.is_image(name) for name in ids)


def test_the_command_that_searches(user):
  (words,) = commands("search")
  assert main.run(words) == 0
  (answer,) = json.loads((user / "found.json").read_text())
  assert answer["query"] == "a dog on a beach" and len(answer["found"]) == 10
  assert (user / "found.png").exists()


def test_the_commands_of_capfilt(user):
  label, merge = commands("capfilt")
  assert main.run(label) == 0
  assert len([*(user / "cleaned").glob("*.parquet")]) == 2
  # Barely trained models would keep nothing.
  merge = [re.sub(r"threshold=.*", "threshold=0.0", word) for word in merge]
  assert main.run(merge) == 0
  assert [*(user / "clean").glob("*.tar")]
  for job in ("status", "verify", "report"):
    words = [*label, f"--config.job={job}"]
    assert main.run(words) == 0, job


@pytest.mark.slow
def test_the_command_of_capfilt_as_in_the_paper(user):
  (words,) = commands("capfilt_paper")
  words = [word.replace("01242", "00001") for word in words]
  assert main.run(words) == 0
  assert len([*(user / "cleaned/cc12m").glob("*.parquet")]) == 2


TOOLS = (
  convert_checkpoint,
  inspect_checkpoint,
  score_captions,
  bench,
  conversion,
)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_flags_in_docstrings_of_tools_exist(tool, capsys):
  """What they do is executed by the commands of docs/."""
  doc = ast.get_docstring(ast.parse(pathlib.Path(tool.__file__).read_text()))
  shown = re.findall(r"^  python .*(?:\n   +\S.*)*", doc, re.MULTILINE)
  assert shown
  with pytest.raises(SystemExit) as end:
    tool.main(["--help"])
  assert end.value.code == 0
  usage = capsys.readouterr().out.split("\n\n")[0]
  for flag in re.findall(r"--[a-z][\w-]+", " ".join(shown)):
    assert re.search(rf"{flag}\b", usage), flag


@pytest.mark.slow
def test_the_quick_try_of_the_benchmark(tmp_path):
  (quick,) = re.findall(
    r"^  python tools/bench.py (.*)  +a quick try$", bench.__doc__, re.MULTILINE
  )
  out = tmp_path / "bench.json"
  assert bench.main([*quick.split(), "--out", str(out)]) == 0
  (row,) = results.read(out)
  assert "error" not in row, row["error"]
  assert row["peers"]["plain"]["ratio"] > 0, row
