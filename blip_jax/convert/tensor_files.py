"""Writes files that `torch.load` and safetensors read, without torch."""

import json
import math
import os
import pathlib
import pickle
import struct
import types
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from blip_jax.runtime import ahead, files, host

_STORAGES = {
  np.dtype(np.float64): "DoubleStorage",
  np.dtype(np.float32): "FloatStorage",
  np.dtype(np.float16): "HalfStorage",
  np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
  np.dtype(np.int64): "LongStorage",
  np.dtype(np.int32): "IntStorage",
  np.dtype(np.uint8): "ByteStorage",
  np.dtype(np.bool_): "BoolStorage",
}

# Arrays read ahead. Large and small ones alternate; with only one ahead, small
# ones would wait for large ones.
_AHEAD = 4
_ROOT = "archive"
_ALIGNMENT = 64  # of storages, as in PyTorch's own files
_LOCAL_HEADER = 30
_ZIP64_FIELD = 20


class _Stored(NamedTuple):
  """A tensor whose bytes are the member data/<key>."""

  key: str
  storage: str
  shape: tuple[int, ...]


def save_torch(
  path: str | os.PathLike,
  tensors: Mapping[str, np.ndarray | Callable[[], np.ndarray]],
  ties: Mapping[str, str] = types.MappingProxyType({}),
) -> None:
  """Writes `{"model": state_dict}` as `torch.save` does.

  The file gets its name once it is complete.

  Args:
    path: the file; an existing one is replaced.
    tensors: arrays, or functions that return one. While one is written, at
      most the next `_AHEAD` are read.
    ties: further names -> names in `tensors`, whose memory they share. They
      come last in the state dict.

  Raises:
    ValueError: PyTorch does not have the dtype of an array, or a tie names no
      tensor.
  """
  for name, target in ties.items():
    if name in tensors or target not in tensors:
      raise ValueError(
        f"ties: expected a new name for one of the tensors, found {name!r} "
        f"for {target!r}; correct the name, or leave the tie out"
      )
  path = pathlib.Path(path)
  unfinished = files.temporary_path(path)
  try:
    with (
      host.create_file(unfinished) as file,
      zipfile.ZipFile(file, "w") as archive,
    ):
      _write(archive, tensors, ties)
    files.rename(unfinished, path)
  finally:
    files.remove(unfinished)


def _write(
  archive: zipfile.ZipFile,
  tensors: Mapping[str, np.ndarray | Callable[[], np.ndarray]],
  ties: Mapping[str, str],
) -> None:
  # Reading includes making the array contiguous, which takes about as long as
  # computing its checksum and writing it.
  read = lambda value: np.asarray(
    value() if callable(value) else value, order="C"
  )
  arrays = ahead.map_ahead(read, tensors.values(), _AHEAD)
  # `zip` would keep each array in memory longer.
  stored = {
    name: _store(archive, str(number), name, next(arrays))
    for number, name in enumerate(tensors)
  }
  stored |= {name: stored[target] for name, target in ties.items()}
  # Readers find members by name, so the pickle may follow the tensors.
  _member(archive, "data.pkl", _pickle(stored))
  _member(archive, "byteorder", b"little")
  _member(archive, "version", b"3\n")


def _store(
  archive: zipfile.ZipFile, key: str, name: str, array: np.ndarray
) -> _Stored:
  if array.dtype not in _STORAGES:
    raise ValueError(
      f"{name}: expected one of {', '.join(map(str, _STORAGES))}, found "
      f"{array.dtype}; convert it first"
    )
  # As bytes, since not every dtype (bfloat16) can be a buffer.
  content = array.reshape(-1).view(np.uint8)
  _member(archive, f"data/{key}", content.data)
  return _Stored(key, _STORAGES[array.dtype], array.shape)


def _member(
  archive: zipfile.ZipFile, name: str, content: bytes | memoryview
) -> None:
  """Writes a member whose bytes start at a multiple of `_ALIGNMENT`."""
  assert archive.fp is not None
  info = zipfile.ZipInfo(f"{_ROOT}/{name}")
  start = archive.fp.tell() + _LOCAL_HEADER + len(info.filename) + _ZIP64_FIELD
  # A field of the header: the tag, its length, padding.
  padding = -(start + 4) % _ALIGNMENT
  info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
  # Always with the field for large sizes, so that its length is known.
  with archive.open(info, "w", force_zip64=True) as member:
    member.write(memoryview(content))


def _pickle(stored: Mapping[str, _Stored]) -> bytes:
  """Returns the pickle of {"model": OrderedDict} over stored tensors."""
  state_dict = b"".join(
    _text(name) + _tensor(tensor) for name, tensor in stored.items()
  )
  return b"".join(
    (
      pickle.PROTO + b"\2",
      pickle.EMPTY_DICT + _text("model") + _ordered_dict(),
      pickle.MARK + state_dict + pickle.SETITEMS,
      pickle.SETITEM + pickle.STOP,
    )
  )


def _tensor(tensor: _Stored) -> bytes:
  size = int(np.prod(tensor.shape, dtype=np.int64))
  strides = [
    int(np.prod(tensor.shape[axis + 1 :], dtype=np.int64))
    for axis in range(len(tensor.shape))
  ]
  storage = _tuple(
    _text("storage"),
    _global("torch", tensor.storage),
    _text(tensor.key),
    _text("cpu"),
    _integer(size),
  )
  return (
    _global("torch._utils", "_rebuild_tensor_v2")
    + _tuple(
      storage + pickle.BINPERSID,
      _integer(0),
      _tuple(*map(_integer, tensor.shape)),
      _tuple(*map(_integer, strides)),
      pickle.NEWFALSE,
      _ordered_dict(),
    )
    + pickle.REDUCE
  )


def _ordered_dict() -> bytes:
  return _global("collections", "OrderedDict") + _tuple() + pickle.REDUCE


def _global(module: str, name: str) -> bytes:
  return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _tuple(*items: bytes) -> bytes:
  return pickle.MARK + b"".join(items) + pickle.TUPLE


def _integer(value: int) -> bytes:
  content = pickle.encode_long(value)
  return pickle.LONG1 + bytes([len(content)]) + content


def _text(value: str) -> bytes:
  content = value.encode()
  return pickle.BINUNICODE + struct.pack("<I", len(content)) + content


def save_safetensors(
  path: str | os.PathLike,
  tensors: Mapping[str, Callable[[], np.ndarray]],
  shapes: Mapping[str, tuple[int, ...]],
) -> None:
  """Writes a safetensors file of float32 arrays, a few in memory at a time.

  The library's own writer needs all of them at once.

  Args:
    path: the file; an existing one is replaced.
    tensors: functions that return an array, by name.
    shapes: of the arrays, by name.
  """
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, shape in shapes.items():
    begin, end = end, end + 4 * math.prod(shape)
    header[name] = {
      "dtype": "F32",
      "shape": list(shape),
      "data_offsets": [begin, end],
    }
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with host.create_file(path) as file:
    file.write(struct.pack("<Q", len(text)) + text)
    read = lambda name: np.ascontiguousarray(tensors[name](), "<f4")
    for array in ahead.map_ahead(read, shapes, _AHEAD):
      file.write(array)
