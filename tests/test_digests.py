"""Damage to any file of a checkpoint is found, and the file is named."""

import os
import pathlib

import pytest

from blip_jax.runtime import digests, files, snapshot
from tests import helpers


@pytest.fixture
def folder(tmp_path):
  """Files of a few sizes, with digests."""
  for name in ("params/d/large", "meta/meta.json", "_CHECKPOINT_METADATA"):
    path = tmp_path / "step" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.urandom(10_000))
  (tmp_path / "step" / "meta" / "empty").touch()
  digests.write(tmp_path / "step")
  digests.complete(tmp_path / "step")
  return tmp_path / "step"


def flip(path, bit=4321):
  content = bytearray(path.read_bytes())
  content[bit // 8] ^= 1 << bit % 8
  path.write_bytes(content)


def swap(folder):
  one, two = folder / "params/d/large", folder / "meta/meta.json"
  first, second = one.read_bytes(), two.read_bytes()
  one.write_bytes(second)
  two.write_bytes(first)


def pipe(folder):
  (folder / "meta" / "empty").unlink()
  os.mkfifo(folder / "meta" / "empty")


def test_sound_files_are_sound(folder):
  assert digests.damage(folder) == []
  digests.check(folder)
  digests.Verification(folder).wait()
  # A folder may be copied or renamed.
  copy = folder.rename(folder.with_name("copy"))
  assert digests.damage(copy) == []


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda f: flip(f / "params/d/large"), "params/d/large: expected 10000 by"),
    (lambda f: flip(f / "_CHECKPOINT_METADATA"), "_CHECKPOINT_METADATA: expe"),
    (lambda f: (f / "params/d/large").unlink(), "params/d/large is missing"),
    (lambda f: (f / "params/d/more").touch(), "params/d/more was added"),
    (lambda f: (f / "meta/empty").unlink(), "meta/empty is missing"),
    (lambda f: (f / "meta/meta.json").write_bytes(b""), "10000 bytes, found 0"),
    (lambda f: (f / "meta/empty").write_bytes(b"x"), "expected 0 bytes, found"),
    (lambda f: os.truncate(f / "params/d/large", 9_999), "found 9999"),
    (swap, "meta/meta.json: expected 10000 bytes with CRC-32"),
    (pipe, "meta/empty is no regular file"),
    (lambda f: (f / "digests.json").write_text(""), "digests.json: cannot be"),
    (lambda f: (f / "digests.json").write_text("{}"), "digests.json: expected"),
  ],
)
def test_damage_is_named(folder, change, said):
  change(folder)
  for check in (digests.check, lambda f: digests.Verification(f).wait()):
    with pytest.raises(digests.Damaged) as error:
      check(folder)
    assert str(error.value).startswith(f"{folder} is damaged: ")
    assert said in str(error.value)
    assert error.value.folder == str(folder)


def test_every_bit_of_the_digests_matters(folder):
  path = folder / "digests.json"
  content = path.read_bytes()
  for bit in range(8 * len(content)):
    flip(path, bit)
    assert digests.damage(folder), f"bit {bit}"
    path.write_bytes(content)
  assert digests.damage(folder) == []


def test_only_the_items_that_are_read_are_compared(folder):
  flip(folder / "params/d/large")
  digests.check(folder, ("meta",))
  digests.Verification(folder, ("meta",)).wait()
  with pytest.raises(digests.Damaged):
    digests.check(folder, ("params",))
  # Sizes are compared of all.
  os.truncate(folder / "params/d/large", 1)
  with pytest.raises(digests.Damaged):
    digests.check(folder, ("meta",))


def test_a_folder_without_digests_and_no_folder_pass(folder):
  (folder / "digests.json").unlink()
  flip(folder / "params/d/large")
  digests.check(folder)
  digests.Verification(folder).wait()
  digests.Verification("").wait()


def test_what_a_killed_process_wrote_halfway_is_no_damage(folder):
  files.temporary_path(folder / "x").touch()
  digests.check(folder)


def test_a_step_has_digests_of_all_its_files(tmp_path):
  helpers.ToyRun().save(tmp_path, 1)
  step = snapshot.find(tmp_path)
  for path in sorted(pathlib.Path(step).glob("**/*")):
    if path.is_file() and path.stat().st_size:
      content = path.read_bytes()
      flip(path, 0)
      assert digests.damage(step), path
      path.write_bytes(content)
  assert digests.damage(step) == []
