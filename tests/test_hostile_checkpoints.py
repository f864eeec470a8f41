"""Mutated checkpoints load as what they say, or are refused by name.

Nothing in them is executed, and none takes much time or memory.
"""

import pathlib
import random
import resource
import time

import numpy as np
import pytest
import safetensors.numpy

from blip_jax.convert import opening, reader, tensor_files
from blip_jax.runtime import digests, snapshot
from tests import helpers, hostile
from tests.hostile import checkpoints

SLIM, ALL = 400, 12_000
SECONDS, KILOBYTES = 2, 300_000


def _outcome(path, content, is_exact):
  """What is wrong with how a file is read; "" if nothing is."""
  path.write_bytes(content)
  start = time.monotonic()
  try:
    tensors = reader.read(path)
    found = {name: np.array(tensors[name]) for name in tensors}
  except ValueError as error:
    found = None
    if str(path) not in str(error):
      return f"{path.name}: the error does not name it: {error}"
    if len(str(error)) > 2000:
      return f"{path.name}: the error has {len(str(error))} characters"
  except BaseException as error:
    return f"{path.name}: {error!r}"
  finally:
    path.unlink()
  if time.monotonic() - start > SECONDS:
    return f"{path.name} took {time.monotonic() - start:.1f} s"
  if found is not None and is_exact:
    expected = checkpoints.TENSORS | {"tied": checkpoints.TENSORS["ids"]}
    if path.suffix == ".safetensors":
      # There is no checksum in it, so that the bytes are what is meant.
      expected = safetensors.numpy.load(content)
    if not _same(found, expected):
      return f"{path.name} has other tensors"
  return ""


def _same(found, expected):
  return found.keys() == expected.keys() and all(
    found[name].dtype == array.dtype
    and found[name].shape == array.shape
    and found[name].tobytes() == array.tobytes()
    for name, array in expected.items()
  )


def _check_files(tmp_path, count):
  marker = tmp_path / "executed"
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  failed = []
  for name, content in checkpoints.cases(18, count, tmp_path, marker):
    failed += filter(
      None, [_outcome(tmp_path / name, content, name.startswith("bytes"))]
    )
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
  if grown > KILOBYTES:
    failed.append(f"memory grew by {grown} kB")
  if marker.exists():
    failed.append("code of a checkpoint was executed")
  hostile.report("checkpoints", count, failed)


def _check_models(tmp_path, count):
  """Tensors that make no model are refused; all others can be read."""
  sound = reader.read(helpers.golden_checkpoint("blip_decoder"))
  sound = {name: sound[name] for name in sound}
  rng, failed = random.Random(18), []
  path = tmp_path / "mutated.pth"
  for number in range(count):
    tensors = checkpoints.mutated_tensors(rng, sound)
    what = {
      name: (array.shape, array.dtype)
      for name, array in tensors.items()
      if array is not sound.get(name)
    }
    tensor_files.save_torch(path, tensors)
    try:
      opened = opening.open_checkpoint(path, **helpers.OPEN_GOLDEN)
      for leaf in opened.leaves.values():
        assert leaf.read().shape == leaf.shape
    except ValueError as error:
      if str(path) not in str(error):
        failed.append(f"{number}: {what}: not named in {error!s:.200}")
    except BaseException as error:
      failed.append(f"{number}: {what}: {error!r:.200}")
  hostile.report("tensors of a model", count, failed)


def _check_steps(tmp_path, count):
  """A flipped bit is found in any file of a step, by everything that loads."""
  run = helpers.ToyRun((1, 1, 1))
  run.save(tmp_path, 1)
  run.save(tmp_path, 2)
  folder = snapshot.find(tmp_path)
  failed = []
  for path, bit in checkpoints.flipped_bits(18, count, pathlib.Path(folder)):
    found = digests.damage(folder)
    name = path.relative_to(folder).as_posix()
    # A flipped bit of the digests may say another name for a file.
    if name not in str(found) and not (name == digests.NAME and found):
      failed.append(f"{name}, bit {bit}: {found}")
    if snapshot.find_sound(tmp_path).name != "1":
      failed.append(f"{name}, bit {bit}: the damaged step is used")
    snapshot.forget(folder)
  if snapshot.find_sound(tmp_path).name != "2":
    failed.append("without damage, another step is used")
  hostile.report("flipped bits of a step", count, failed)


def test_mutated_files(tmp_path):
  _check_files(tmp_path, SLIM)


def test_mutated_models(tmp_path):
  _check_models(tmp_path, 8)


def test_flipped_bits_of_a_step(tmp_path):
  _check_steps(tmp_path, 12)


@pytest.mark.slow
def test_all_mutated_files(tmp_path):
  _check_files(tmp_path, ALL)


@pytest.mark.slow
def test_many_mutated_models(tmp_path):
  _check_models(tmp_path, 500)


@pytest.mark.slow
def test_many_flipped_bits_of_a_step(tmp_path):
  _check_steps(tmp_path, 1000)
