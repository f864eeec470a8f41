"""What `pip install` brings: every package, recipes, tools, and commands."""

import configparser
import pathlib
import re
import subprocess
import sys

import pytest

from blip_jax.cli import recipes

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setup():
  parser = configparser.ConfigParser()
  parser.read(ROOT / "setup.cfg")
  return parser


def test_every_package_is_installed(setup):
  folders = {"blip_jax": "blip_jax", "configs": "blip_jax.configs"}
  folders["tools"] = "blip_jax.tools"
  packages = set()
  for folder, package in folders.items():
    for path in (ROOT / folder).rglob("__init__.py"):
      parts = path.parent.relative_to(ROOT / folder).parts
      packages.add(".".join((package, *parts)))
  assert set(setup["options"]["packages"].split()) == packages
  for path in (ROOT / "blip_jax").rglob("*.py"):
    assert (path.parent / "__init__.py").exists(), path


def test_data_files_are_installed(setup):
  listed = dict(setup["options.package_data"])
  assert listed["blip_jax"] == "py.typed"
  assert (ROOT / "blip_jax" / "py.typed").exists()
  assert listed["blip_jax.data.scenes"] == "vocab/vocab.txt"
  assert listed["blip_jax.tools.browser"] == "*.html, *.js"


def test_recipes_are_found_by_name():
  assert "quickstart" in recipes.names()
  assert "__init__" not in recipes.names()
  assert pathlib.Path(recipes.path_of("quickstart")).is_file()
  for path in ("configs/quickstart.py", "./mine.py", "mine.py", "a/b"):
    assert recipes.path_of(path) == path


def run(*words, cwd):
  return subprocess.run(
    [sys.executable, "-m", "blip_jax.main", *words],
    cwd=cwd,
    capture_output=True,
    text=True,
  )


def test_an_unknown_name_lists_the_known_ones(tmp_path):
  done = run("--config", "quikstart", cwd=tmp_path)
  assert done.returncode == 2
  assert "no recipe is called 'quikstart'" in done.stderr
  assert "Did you mean 'quickstart'?" in done.stderr
  for name in recipes.names():
    assert re.search(rf"\b{name}\b", done.stderr), name
  assert "Traceback" not in done.stderr


def test_a_file_outside_the_package_works(tmp_path):
  source = pathlib.Path(recipes.path_of("quickstart")).read_text()
  (tmp_path / "mine.py").write_text(source)
  for path in ("mine.py", "./mine.py", str(tmp_path / "mine.py")):
    done = run("--config", path, "--config.job=nothing", cwd=tmp_path)
    assert "config.job: expected one of" in done.stderr
