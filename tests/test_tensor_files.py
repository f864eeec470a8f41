"""Files that are written for PyTorch and safetensors."""

import os
import time
import weakref

import numpy as np
import pytest

from blip_jax.convert import reader, tensor_files
from blip_jax.runtime import host
from tests import helpers

FOUR = np.arange(4, dtype=np.float32)


def test_at_most_two_arrays_are_in_memory(tmp_path):
  """The next one is read while one is written."""
  made = []

  def make():
    # The array before the previous one is being released meanwhile.
    alive = [before for before in made if before() is not None]
    deadline = time.monotonic() + 5
    while len(alive) > 1 and time.monotonic() < deadline:
      alive = [before for before in alive if before() is not None]
    assert len(alive) <= 1
    array = np.zeros(10, np.float32)
    made.append(weakref.ref(array))
    return array

  tensor_files.save_torch(tmp_path / "a.pth", {str(i): make for i in range(6)})
  assert len(reader.read(tmp_path / "a.pth")) == 6


def test_a_file_is_synced_in_portions(tmp_path, monkeypatch):
  synced, sync = [], os.fsync
  monkeypatch.setattr(host, "_PORTION", 1000)
  monkeypatch.setattr(os, "fsync", lambda file: synced.append(sync(file)))
  arrays = {str(n): np.full(2000, n, np.float32) for n in range(4)}
  tensor_files.save_torch(tmp_path / "a.pth", arrays)
  assert len(synced) >= 4
  for name, array in reader.read(tmp_path / "a.pth").items():
    np.testing.assert_array_equal(array, arrays[name])


def test_a_failed_write_keeps_the_existing_file(tmp_path):
  path = tmp_path / "a.pth"
  tensor_files.save_torch(path, {"a": FOUR})
  before = path.read_bytes()

  def fail():
    raise RuntimeError("no such weights")

  with pytest.raises(RuntimeError, match="no such weights"):
    tensor_files.save_torch(path, {"a": FOUR, "b": fail})
  with pytest.raises(
    ValueError, match=r"b: expected one of float64.*complex64"
  ):
    tensor_files.save_torch(path, {"a": FOUR, "b": FOUR.astype(np.complex64)})
  for ties in ({"b": "c"}, {"a": "a"}):
    with pytest.raises(ValueError, match="ties: expected a new name"):
      tensor_files.save_torch(path, {"a": FOUR}, ties)
  assert os.listdir(tmp_path) == ["a.pth"]
  assert path.read_bytes() == before


@pytest.mark.parity
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_the_written_file(tmp_path, mmap):
  torch = pytest.importorskip("torch", reason="needs the extra [parity]")
  arrays = helpers.arrays_of_all_dtypes()
  tensor_files.save_torch(tmp_path / "a.pth", arrays, {"tied": "transposed"})
  saved = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mmap)
  assert list(saved) == ["model"]
  loaded = saved["model"]
  assert list(loaded) == [*arrays, "tied"]
  assert loaded["tied"].data_ptr() == loaded["transposed"].data_ptr()
  for name, array in arrays.items():
    tensor = loaded[name]
    assert tensor.shape == array.shape
    assert str(tensor.dtype) == f"torch.{array.dtype}"
    assert tensor.is_contiguous() and tensor.data_ptr() % 64 == 0
    raw = tensor.reshape(-1).view(torch.uint8).numpy()
    assert raw.tobytes() == array.tobytes(), name


def test_safetensors_round_trip(tmp_path):
  arrays = {"a": FOUR.reshape(2, 2).T, "b": FOUR[0], "c": FOUR[:0]}
  tensor_files.save_safetensors(
    tmp_path / "a.safetensors",
    {name: lambda array=array: array for name, array in arrays.items()},
    {name: array.shape for name, array in arrays.items()},
  )
  tensors = reader.read(tmp_path / "a.safetensors")
  assert list(tensors) == list(arrays)
  for name, array in arrays.items():
    np.testing.assert_array_equal(tensors[name], array)
