"""A safe reader of PyTorch and safetensors checkpoints, without torch.

Pickles are interpreted, never executed (`pickles.py`).
"""

import json
import math
import os
import pathlib
import re
import struct
import zipfile
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import safetensors

from blip_jax.convert import pickles, state_dicts
from blip_jax.convert.pickles import BRIEF, RESAVE, Refusal, Tensor
from blip_jax.convert.storages import FETCH_AGAIN, Storage, damaged
from blip_jax.runtime import files, json_files

# In order of preference; an index names the files of a sharded checkpoint.
_IN_DIRECTORY = (
  "model.safetensors",
  "model.safetensors.index.json",
  "pytorch_model.bin",
  "pytorch_model.bin.index.json",
  "model.pth",
)
_SHARD = re.compile(r"[\w-][\w.-]*\.(safetensors|bin|pth|pt)")

_MAX_PICKLE_BYTES = 4 << 20  # BLIP ViT-L with its optimizer needs below 1 MiB
# Weights hardly compress; deflate can reach a factor of 1000.
_MAX_INFLATION = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 100}
_OTHER_FORMATS = {
  b"\x80": (
    "a bare pickle, as PyTorch wrote before 1.6; save it again: python -c "
    "\"import torch; torch.save(torch.load('{path}', map_location='cpu', "
    "weights_only=True), 'NEW')\""
  ),
  b"<": "a web page, not a checkpoint; download the file that it links to",
  b"version https://git-lfs": (
    "a git-lfs pointer, not the file itself; run `git lfs pull`"
  ),
  b"{": "a JSON file; pass the checkpoint, or the directory that holds it",
  b"\x89HDF": "an HDF5 file (Keras or TensorFlow); only PyTorch's can be read",
  b"GGUF": "a GGUF file (llama.cpp); only PyTorch's weights can be read",
  b"\x93NUMPY": "a NumPy array; expected a state dict of named tensors",
  b"\x1f\x8b": "compressed by gzip; unpack it first",
}

_SAFETENSORS_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U8": np.uint8,
  "BOOL": np.bool_,
}


class Tensors(Mapping[str, Any]):
  """The named tensors of a checkpoint, each read when it is accessed.

  `tensors[name]` is a read-only array. Unless the file is compressed, it is a
  view of the file, which takes no memory; the file must not change meanwhile.
  Files are closed when neither this object nor any of its arrays is left.

  Attributes:
    path: the file; of a sharded checkpoint, the index.
    ignored: other top-level keys of the file ("optimizer", "epoch").
  """

  def __init__(
    self,
    path: pathlib.Path,
    tensors: Mapping[str, Tensor],
    ignored: list[str],
  ):
    self.path = path
    self.ignored = ignored
    self._tensors = tensors

  def __getitem__(self, name: str) -> np.ndarray:
    tensor = self._tensors[name]
    buffer = tensor.storage.buffer()
    return np.ndarray(
      tensor.shape, tensor.dtype, buffer, tensor.offset, tensor.strides
    )

  def __iter__(self) -> Iterator[str]:
    return iter(self._tensors)

  def __contains__(self, name: object) -> bool:
    return name in self._tensors

  def __len__(self) -> int:
    return len(self._tensors)

  def shape(self, name: str) -> tuple[int, ...]:
    return self._tensors[name].shape

  def dtype(self, name: str) -> np.dtype:
    return self._tensors[name].dtype

  def renamed(self, names: Mapping[str, str]) -> "Tensors":
    """Some of the tensors under other names.

    Args:
      names: new name -> name in the file.
    """
    tensors = {new: self._tensors[name] for new, name in names.items()}
    return Tensors(self.path, tensors, self.ignored)

  def alias(self, name: str) -> Hashable:
    """A key that is equal for tied tensors, which share their memory."""
    return self._tensors[name]


def read(path: str | os.PathLike) -> Tensors:
  """Opens a checkpoint; reads only names, shapes and dtypes.

  Args:
    path: a file of `torch.save` (PyTorch 1.6 or later) or of safetensors, with
      any suffix; the index of a sharded checkpoint; or a folder with
      model.safetensors, pytorch_model.bin, an index of either, or model.pth.

  Raises:
    ValueError: there is no checkpoint, or it is damaged, hostile or holds no
      weights; says what was found and what to do.
  """
  path = pathlib.Path(path)
  if files.is_folder(path):
    path = _in_directory(path)
  elif not files.is_file(path):
    raise ValueError(f"{path}: no such file or directory; check the path")
  if path.name.endswith(".index.json"):
    return Tensors(path, _read_shards(path), [])
  return Tensors(path, *_read_file(path))


def _in_directory(directory: pathlib.Path) -> pathlib.Path:
  for name in _IN_DIRECTORY:
    if files.is_file(directory / name):
      return directory / name
  raise ValueError(
    f"{directory} holds no checkpoint: expected one of "
    f"{', '.join(_IN_DIRECTORY)}; if it has another name, pass the file itself"
  )


def _read_shards(index: pathlib.Path) -> dict[str, Tensor]:
  try:
    shard_of = json_files.read(index, {"weight_map": dict})["weight_map"]
  except (ValueError, KeyError) as error:
    raise ValueError(
      f'{index}: expected JSON with "weight_map", an object from names to '
      f"files ({error}); fetch it again"
    ) from error
  shards = {}
  for shard in shard_of.values():
    # An index must not lead out of its folder.
    if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
      raise ValueError(
        f"{index}: expected the plain name of a file in the same folder, such "
        f"as model-00001-of-00002.safetensors, found {BRIEF.repr(shard)}; do "
        "not use this checkpoint unless you know why"
      )
    if not files.is_file(index.parent / shard):
      raise ValueError(
        f"{index} needs {shard} in the same folder; fetch that file too"
      )
    if shard not in shards:
      shards[shard], _ = _read_file(index.parent / shard)
  missing = [n for n, shard in shard_of.items() if n not in shards[shard]]
  if missing or not shard_of:
    raise ValueError(
      f"{index}: {len(missing)} of {len(shard_of)} tensors are not in their "
      f"files ({BRIEF.repr(missing)}); fetch the index and its files again"
    )
  return {name: shards[shard][name] for name, shard in shard_of.items()}


def _read_file(path: pathlib.Path) -> tuple[dict[str, Tensor], list[str]]:
  """Returns the tensors of one file, and its other top-level keys."""
  with files.open_read(path) as file:
    try:
      return _parse(path, file)
    except Refusal as refusal:
      raise ValueError(f"{path}: {refusal}") from None
    except ValueError as error:
      raise damaged(path, str(error)) from error
    # Truncated, damaged or forged files make parsers raise anything:
    # IndexError, struct.error, BadZipFile, RecursionError, MemoryError, ...
    except Exception as error:
      raise damaged(path, repr(error)) from error


def _parse(
  path: pathlib.Path, file: BinaryIO
) -> tuple[dict[str, Tensor], list[str]]:
  head = file.read(64)
  if not head:
    raise Refusal(f"expected a checkpoint, found 0 bytes; {FETCH_AGAIN}")
  if head.startswith(b"PK"):
    return _parse_torch(path, file)
  # safetensors: the length of the header, then its JSON.
  if head[4:9] == b"\0\0\0\0{":
    return _parse_safetensors(path, file), []
  for magic, what in _OTHER_FORMATS.items():
    if head.lstrip().startswith(magic):
      raise Refusal(what.format(path=path))
  raise Refusal(
    "expected a file of torch.save or of safetensors, found one that starts "
    f"with {head[:16]!r}; {FETCH_AGAIN}"
  )


def _parse_safetensors(path, file):
  # Checks that the header fits the file, and that no two tensors overlap.
  with safetensors.safe_open(path, framework="np"):
    pass
  file.seek(0)
  length = int.from_bytes(file.read(8), "little")
  header = json.loads(file.read(length))
  header.pop("__metadata__", None)
  opened = _reopen(file)
  tensors = {}
  for name, entry in header.items():
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
      raise Refusal(
        f"{BRIEF.repr(name)} has the dtype {entry['dtype']}; expected one of "
        f"{', '.join(_SAFETENSORS_DTYPES)}; convert it in PyTorch first"
      )
    dtype = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]])
    start, end = entry["data_offsets"]
    size = end - start
    storage = Storage(path, opened, name, 8 + length + start, size, size)
    shape = tuple(entry["shape"])
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    elements = pickles.Elements(storage, dtype, size // dtype.itemsize)
    tensors[name] = pickles.tensor(elements, 0, shape, strides)
  return state_dicts.checked(tensors)


def _parse_torch(path, file):
  members = _members(path, file)
  if any(re.search(r"(^|/)(code/|constants\.pkl$)", name) for name in members):
    raise Refusal(
      "expected weights, found a TorchScript program; save its weights: "
      "torch.save("
      f'{{"model": torch.jit.load("{path}").state_dict()}}, "NEW")'
    )
  roots = [
    n.removesuffix("data.pkl") for n in members if n.endswith("/data.pkl")
  ]
  if len(roots) != 1:
    raise Refusal(
      "a zip file, but not one of torch.save: expected one member "
      f"<name>/data.pkl, found {len(roots)}; pass the checkpoint itself, or "
      f"make one: {RESAVE}"
    )
  (root,) = roots
  order = members.get(f"{root}byteorder")
  if order and (order.size != 6 or bytes(order.buffer()) != b"little"):
    raise Refusal(
      f"expected little-endian numbers, found big-endian ones; load it and "
      f"{RESAVE} on an x86 or ARM machine"
    )
  program = members[f"{root}data.pkl"]
  if program.size > _MAX_PICKLE_BYTES:
    raise Refusal(
      f"data.pkl has {program.size} bytes, expected at most "
      f"{_MAX_PICKLE_BYTES} for a state dict; save the weights only: {RESAVE}"
    )
  prefix = f"{root}data/"
  storages = {
    name.removeprefix(prefix): storage
    for name, storage in members.items()
    if name.startswith(prefix)
  }
  saved = pickles.interpret(bytes(program.buffer()), storages)
  return state_dicts.find(saved)


def _reopen(file: BinaryIO) -> BinaryIO:
  """The same file, which stays open as long as tensors refer to it."""
  return os.fdopen(os.dup(file.fileno()), "rb")


def _members(path, file) -> dict[str, Storage]:
  """Positions of the members of a zip file, by name.

  The directory at the end of the file and the header of each member must
  agree, and members must not overlap: forged files violate either.
  """
  with zipfile.ZipFile(file) as archive:
    infos = archive.infolist()
  opened, size = _reopen(file), os.fstat(file.fileno()).st_size
  members, end = {}, 0
  for info in sorted(infos, key=lambda info: info.header_offset):
    name, brief = info.orig_filename, BRIEF.repr(info.orig_filename)
    file.seek(info.header_offset)
    magic, method, name_length, extra_length = struct.unpack(
      "<4s4xH16xHH", file.read(30)
    )
    raw_name = name.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    if (magic, method) != (b"PK\3\4", info.compress_type) or (
      file.read(name_length) != raw_name
    ):
      raise ValueError(f"the two headers of member {brief} differ")
    start = info.header_offset + 30 + name_length + extra_length
    if info.header_offset < end or start + info.compress_size > size:
      raise ValueError(f"member {brief} overlaps another or the file's end")
    end = start + info.compress_size
    if name in members:
      raise ValueError(f"there are two members {brief}")
    if info.flag_bits & 1 or method not in _MAX_INFLATION:
      raise Refusal(
        f"member {brief} is encrypted, or compressed by a method other than "
        f"deflate; load it with torch, if you can, and {RESAVE}"
      )
    if info.file_size > _MAX_INFLATION[method] * info.compress_size:
      raise ValueError(
        f"member {brief} claims to inflate from {info.compress_size} to "
        f"{info.file_size} bytes"
      )
    deflated = method == zipfile.ZIP_DEFLATED
    members[name] = Storage(
      path,
      opened,
      name,
      start,
      info.compress_size,
      info.file_size,
      deflated,
      info.CRC,
    )
  return members
