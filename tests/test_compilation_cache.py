"""Compiled programs are kept, where nobody else can put some."""

import pathlib

import jax
import pytest

from blip_jax import main
from blip_jax.cli import command_line
from blip_jax.runtime import compilation_cache

KEY = "jax_compilation_cache_dir"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
  """A cache folder of the test; JAX's own setting is restored."""
  before = jax.config.values[KEY]
  monkeypatch.delenv(compilation_cache.VARIABLE, raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  yield tmp_path
  jax.config.update(KEY, before)


def used():
  return jax.config.values[KEY]


def test_programs_are_kept_in_a_folder_of_the_user(home):
  compilation_cache.enable()
  folder = pathlib.Path(used())
  assert folder.parent == home / "cache" / "blip_jax"
  assert folder.stat().st_mode & 0o777 == 0o700
  compilation_cache.enable()
  assert used() == str(folder)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_nothing_is_kept_where_others_can_write(home, caplog, depth):
  before = used()
  compilation_cache.enable()
  folder = pathlib.Path(used())
  jax.config.update(KEY, before)
  place = [folder, *folder.parents][depth]
  place.chmod(0o777)
  compilation_cache.enable()
  assert used() == before
  assert f"{place}: other users can write there" in caplog.text
  place.chmod(0o1777)  # as /tmp: nobody can replace what others have made
  compilation_cache.enable()
  assert used() == (before if depth == 0 else str(folder))


def test_a_home_that_cannot_be_written_keeps_nothing(home, caplog):
  before = used()
  (home / "cache").write_text("a file")
  compilation_cache.enable()
  assert used() == before and "are not kept" in caplog.text


def test_the_folder_of_the_environment_is_used(home, monkeypatch):
  before = used()
  monkeypatch.setenv(compilation_cache.VARIABLE, str(home / "mine"))
  compilation_cache.enable()  # JAX has read the variable by itself
  assert used() == before and not (home / "cache").exists()


@pytest.fixture
def saved(home, monkeypatch):
  """A folder with a program of a plan."""
  folder = home / "saved"
  folder.mkdir()
  (folder / "jit_step-00-cache").write_bytes(b"a program")
  assert compilation_cache.seal(folder) == ["jit_step-00-cache"]
  monkeypatch.setenv(compilation_cache.VARIABLE, str(folder))
  return folder


def test_saved_programs_may_have_company(saved, caplog):
  caplog.set_level("INFO")
  (saved / "jit_other-00-cache").write_bytes(b"of a job")
  compilation_cache.enable()
  assert f"1 saved programs are in {saved}" in caplog.text


def test_a_saved_program_that_was_changed_is_refused(saved):
  program = saved / "jit_step-00-cache"
  program.write_bytes(b"another program")
  with pytest.raises(ValueError, match=r"jit_step-00-cache is not the program"):
    compilation_cache.enable()
  program.unlink()
  with pytest.raises(ValueError, match="found no file"):
    compilation_cache.enable()


def test_programs_are_not_saved_where_others_can_write(home):
  (home / "open").mkdir()
  (home / "open").chmod(0o777)
  before = used()
  with pytest.raises(OSError, match="other users can write there"):
    compilation_cache.save_in(home / "open")
  assert used() == before


@pytest.mark.parametrize("kept", [True, False])
def test_a_key_turns_it_off(home, monkeypatch, kept):
  monkeypatch.setitem(main.JOBS, "caption", lambda *_: {})
  monkeypatch.setattr(main, "prepare_process", lambda: None)
  words = ["--config=caption_images", f"--workdir={home}/run"]
  flag = (
    "--config.compilation_cache" if kept else "--noconfig.compilation_cache"
  )
  main.main(command_line.parse([*words, flag]))
  assert (home / "cache").exists() == kept
