"""Folders below a folder, and patterns with `**`."""

import glob
import os

import pytest

from blip_jax.data import datasets
from blip_jax.runtime import trees


@pytest.fixture
def tree(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ("a.png", "s/a.png", "s/t/b.png", "s/[x]/c.png", "u/.h/d.png"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
  return tmp_path


@pytest.mark.parametrize(
  "pattern",
  ["*.png", "**/*.png", "s/**/*.png", "*/**/b.png", "**/t/*", "**/t/**/*.png",
   "s/**/[[]x]/*", "**/nothing", "nothing/**/*.png", "?/**/*"],
)  # fmt: skip
def test_patterns_match_as_in_python(tree, pattern):
  expected = sorted(set(glob.glob(pattern, recursive=True)))
  assert trees.glob(pattern) == expected
  whole = f"{tree}/{pattern}"
  assert trees.glob(whole) == [f"{tree}/{path}" for path in expected]


def test_all_that_is_below(tree):
  """Without the folder itself, which Python adds."""
  expected = {*glob.glob("s/**", recursive=True)} - {"s/"}
  assert trees.glob("s/**") == sorted(expected)


def test_links_between_folders_do_not_multiply_matches(tmp_path):
  """All paths through nine folders that link to each other are a million."""
  names = [f"d{n}" for n in range(9)]
  for name in names:
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{name}.png").write_bytes(b"")
    for other in names:
      if other != name:
        (tmp_path / name / other).symlink_to(f"../{other}")
  (tmp_path / "d0" / "up").symlink_to("..")
  source = datasets.open_images(f"{tmp_path}/**/*.png")
  ids = [source[row]["id"] for row in range(len(source))]
  assert ids == [f"{name}/{name}.png" for name in names]


def test_a_folder_that_cannot_be_listed_is_reported(tree, monkeypatch):
  entries = trees.files.entries

  def fail(folder):
    if os.path.basename(folder) == "t":
      raise PermissionError(folder)
    return entries(folder)

  monkeypatch.setattr(trees.files, "entries", fail)
  reported = []
  walked = trees.walk(str(tree), lambda *args: reported.append(args))
  assert sorted(walked) == [
    ("", ["a.png"]), ("s", ["a.png"]), ("s/[x]", ["c.png"]), ("u", []),
  ]  # fmt: skip
  ((folder, error),) = reported
  assert folder == "s/t" and isinstance(error, PermissionError)
