"""Checkpoints of PyTorch and safetensors: which are read, and which refused."""

import itertools
import json
import os
import pickle
import random
import struct
import zlib
from typing import NamedTuple

import ml_dtypes
import numpy as np
import psutil
import pytest

from blip_jax.convert import reader, tensor_files
from tests import helpers


def _assert_equal(tensors, expected):
  assert list(tensors) == list(expected)
  for name, array in expected.items():
    assert tensors.shape(name) == tensors[name].shape == array.shape, name
    assert tensors.dtype(name) == tensors[name].dtype == array.dtype, name
    assert tensors[name].tobytes() == array.tobytes(), name
    assert not tensors[name].flags.writeable, name


# The functions below build files that no library would write. `_op` is the part
# of a pickle that pushes a plain value.


def _op(value):
  return pickle.dumps(value, 2)[2:-1]


ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def _storage(
  key="0", count=4, kind="storage", storage=b"ctorch\nFloatStorage\n"
):
  parts = (b"(", _op(kind), storage, _op(key), _op("cpu"), _op(count), b"tQ")
  return b"".join(parts)


def _tensor(shape=(4,), strides=(1,), offset=0, storage=None, rest=b""):
  return b"".join(
    (
      b"ctorch._utils\n_rebuild_tensor_v2\n(",
      _storage() if storage is None else storage,
      *map(_op, (offset, shape, strides, False)),
      ORDERED_DICT + rest + b"tR",
    )
  )


def _dict(**items):
  pairs = b"".join(_op(name) + value for name, value in items.items())
  return b"}(" + pairs + b"u"


def _program(content):
  return b"\x80\x02" + content + b"."


def _deflate(content):
  deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
  return deflater.compress(content) + deflater.flush()


class _Member(NamedTuple):
  """A member of a zip file, as the directory at its end describes it.

  The member's own header is the same, except for `local_*`.
  """

  name: str
  stored: bytes = b""
  size: int | None = None
  method: int = 0
  flags: int = 0
  stored_size: int | None = None
  start: int | None = None
  local_name: str | None = None
  local_method: int | None = None


def _or(value, default):
  return default if value is None else value


def _zip(path, *members):
  body, table = b"", b""
  for m in members:
    start = _or(m.start, len(body))
    sizes = (0, _or(m.stored_size, len(m.stored)), _or(m.size, len(m.stored)))
    local, method = _or(m.local_name, m.name), _or(m.local_method, m.method)
    body += struct.pack("<4s5H", b"PK\3\4", 20, m.flags, method, 0, 0)
    body += struct.pack("<3I2H", *sizes, len(local), 0)
    body += local.encode() + m.stored
    table += struct.pack("<4s6H", b"PK\1\2", 20, 20, m.flags, m.method, 0, 0)
    table += struct.pack("<3I5H2I", *sizes, len(m.name), 0, 0, 0, 0, 0, start)
    table += m.name.encode()
  sizes = (len(members), len(members), len(table), len(body))
  end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *sizes, 0)
  path.write_bytes(body + table + end)
  return path


FOUR = np.arange(4, dtype=np.float32)


def _torch_file(path, content, *more):
  """A file like `torch.save`'s, with the pickle `content` and one storage."""
  members = [
    _Member("archive/data.pkl", _program(content)),
    _Member("archive/data/0", FOUR.tobytes()),
  ]
  return _zip(path, *members, *more)


def _safetensors(path, entries, data=b""):
  header = json.dumps(entries).encode()
  path.write_bytes(struct.pack("<Q", len(header)) + header + data)
  return path


def _entry(dtype="F32", shape=(4,), span=(0, 16)):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


def _refused(path, message):
  with pytest.raises(ValueError, match=message) as error:
    reader.read(path)
  assert str(path) in str(error.value)
  assert len(str(error.value)) < 1000


def test_torch_file_round_trip(tmp_path):
  arrays = helpers.arrays_of_all_dtypes()
  tensor_files.save_torch(tmp_path / "a.pth", arrays)
  tensors = reader.read(tmp_path / "a.pth")
  _assert_equal(tensors, arrays)
  assert tensors.path == tmp_path / "a.pth"
  assert tensors.ignored == []


def test_a_handmade_valid_file_is_read(tmp_path):
  # Otherwise the files below could be refused for another reason.
  content = _dict(
    a=_tensor(), b=_tensor((2, 2), (1, 2)), c=_tensor((3,), (1,), 1)
  )
  tensors = reader.read(_torch_file(tmp_path / "a", content))
  expected = {"a": FOUR, "b": FOUR.reshape(2, 2).T, "c": FOUR[1:]}
  _assert_equal(tensors, expected)


def test_tied_tensors_have_the_same_alias(tmp_path):
  arrays = {
    "a": helpers.random_array((3, 4)),
    "b": helpers.random_array((3, 4)),
  }
  tensor_files.save_torch(tmp_path / "a.pth", arrays, {"c": "a"})
  tensors = reader.read(tmp_path / "a.pth")
  _assert_equal(tensors, arrays | {"c": arrays["a"]})
  assert tensors.alias("a") == tensors.alias("c") != tensors.alias("b")
  one = _dict(a=_tensor(), b=_tensor((2, 2), (2, 1)), c=_tensor((2, 2), (1, 2)))
  tensors = reader.read(_torch_file(tmp_path / "b.pth", one))
  assert len({tensors.alias(name) for name in "abc"}) == 3
  empty = {name: _entry(shape=(0,), span=(0, 0)) for name in "ab"}
  tensors = reader.read(_safetensors(tmp_path / "c", empty))
  assert tensors.alias("a") != tensors.alias("b")


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "I64", "I8"])
def test_safetensors_are_read(tmp_path, dtype):
  array = helpers.random_array((2, 3), reader._SAFETENSORS_DTYPES[dtype])
  scalar = helpers.random_array((), np.bool_)
  end = array.nbytes
  entries = {
    "__metadata__": {"format": "pt"},
    "a": _entry(dtype, (2, 3), (0, end)),
    "b": _entry("BOOL", (), (end, end + 1)),
  }
  data = array.tobytes() + scalar.tobytes()
  tensors = reader.read(_safetensors(tmp_path / "a.bin", entries, data))
  _assert_equal(tensors, {"a": array, "b": scalar})


def test_opening_takes_no_memory_and_arrays_outlive_the_reader(tmp_path):
  size = 75_000_000
  path = _safetensors(
    tmp_path / "a.safetensors", {"a": _entry("F32", (size,), (0, 4 * size))}
  )
  os.truncate(path, path.stat().st_size + 4 * size)  # sparse
  zeros = lambda: np.zeros(size // 4, np.float32)
  tensor_files.save_torch(tmp_path / "a.pth", {"a": zeros})
  before = psutil.Process().memory_info().rss
  arrays = [reader.read(path)["a"], reader.read(tmp_path / "a.pth")["a"]]
  assert arrays[0][size // 2] == arrays[1][-1] == 0
  assert psutil.Process().memory_info().rss - before < 20e6
  assert _open_files(tmp_path) == 2
  del arrays
  assert _open_files(tmp_path) == 0


def _open_files(folder):
  names = [file.path for file in psutil.Process().open_files()]
  return sum(name.startswith(str(folder)) for name in names)


def test_deflated_storages_are_inflated_on_access(tmp_path):
  array = helpers.random_array((1000,))
  program = _program(_dict(a=_tensor((1000,), storage=_storage(count=1000))))
  data = _deflate(array.tobytes())
  path = _zip(
    tmp_path / "a.pth",
    _Member("x/data.pkl", _deflate(program), len(program), method=8),
    _Member("x/data/0", data, array.nbytes, method=8),
  )
  _assert_equal(reader.read(path), {"a": array})


@pytest.mark.parametrize(
  "stored", [b"\xff" * 100, _deflate(bytes(17)), _deflate(bytes(15))]
)
def test_a_damaged_deflated_storage_is_refused_on_access(tmp_path, stored):
  content = _dict(a=_tensor(), b=_tensor(storage=_storage("1")))
  member = _Member("archive/data/1", stored, 16, method=8)
  tensors = reader.read(_torch_file(tmp_path / "a.pth", content, member))
  np.testing.assert_array_equal(tensors["a"], FOUR)
  assert "b" in tensors and tensors.shape("b") == (4,)
  with pytest.raises(ValueError, match=r"a\.pth is damaged .* archive/data/1"):
    tensors["b"]


def test_a_zip_bomb_is_refused(tmp_path):
  # A gigabyte of zeros: deflated blocks that do not refer to each other.
  deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
  block = deflater.compress(bytes(1 << 20)) + deflater.flush(zlib.Z_FULL_FLUSH)
  bomb = block * 1024 + _deflate(b"")
  member = _Member("archive/data/1", bomb, 1 << 30, method=8)
  path = _torch_file(tmp_path / "a.pth", _dict(a=_tensor()), member)
  _refused(
    path, r"'archive/data/1' claims to inflate from .* to 1073741824 bytes"
  )


@pytest.mark.parametrize(
  "content, ignored",
  [
    (_dict(a=_tensor()), []),
    (_dict(model=_dict(a=_tensor()), epoch=_op(3)), ["epoch"]),
    (
      _dict(config=_op({"lr": [1e-5]}), state_dict=_dict(a=_tensor())),
      ["config"],
    ),
    (_dict(model=ORDERED_DICT + _op("a") + _tensor() + b"s"), []),
    (
      _dict(
        model=ORDERED_DICT
        + _op("a")
        + _tensor()
        + b"s"
        + _dict(_metadata=_op({"": {"version": 1}}))
        + b"b",
        optimizer=_op({"state": {0: {"step": 1}}, "betas": (0.9, 0.999)}),
        size=b"ctorch\nSize\n" + _op(((1, 2),)) + b"R",
      ),
      ["optimizer", "size"],
    ),
    (
      _dict(
        a=b"ctorch._utils\n_rebuild_parameter\n("
        + _tensor()
        + b"\x88"
        + ORDERED_DICT
        + b"tR"
      ),
      [],
    ),
    (_dict(a=_tensor(rest=_dict(key=_op("value")))), []),
  ],
)
def test_the_state_dict_is_found(tmp_path, content, ignored):
  tensors = reader.read(_torch_file(tmp_path / "a.pth", content))
  _assert_equal(tensors, {"a": FOUR})
  assert tensors.ignored == ignored


@pytest.mark.parametrize(
  "content, message",
  [
    (
      _dict(my=_dict(a=_tensor())),
      "module, .*found 'my': dict; save one: torch.save",
    ),
    (_dict(model=_dict(a=_tensor(), b=_op(1))), "found 'b': int"),
    (b"}" + _op(7) + _tensor() + b"s", "found 7: Tensor"),
    (_dict(model=b"}"), "found no tensors"),
    (b"}", "found no tensors"),
    (b"](" + _tensor() + b"e", "expected a state dict, found a list"),
    (_tensor(), "expected a state dict, found a Tensor"),
    (_dict(a=_storage()), "found 'a': Elements"),
    (b"}" + _op("n" * 5000) + b"Ns", "found 'nnn"),
  ],
)
def test_files_without_a_state_dict_are_refused(tmp_path, content, message):
  _refused(_torch_file(tmp_path / "a.pth", content), message)


class _Evil:
  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize(
  "function, name",
  [(os.system, "posix.system"), (eval, "__builtin__.eval")],
)
def test_a_pickle_with_a_call_is_refused_and_not_executed(
  tmp_path, function, name
):
  trace = tmp_path / "trace"
  code = (
    f"touch {trace}" if function is os.system else f"open({str(trace)!r}, 'w')"
  )
  evil = _Evil(function, code)
  pickle.loads(pickle.dumps(evil, 2))
  assert trace.exists(), "the pickle is harmful if executed"
  trace.unlink()
  message = (
    rf"asks for '{name}'.*nothing was executed.*torch\.save\(\{{\"model\""
  )
  for content in (_op(evil), _dict(a=_tensor(), b=_op(evil))):
    _refused(_torch_file(tmp_path / "a.pth", content), message)
  assert not trace.exists()


@pytest.mark.parametrize(
  "name",
  [
    "torch load",
    "torch.hub load",
    "torch._utils _rebuild_tensor_v3",
    "torch FloatStorage.from_file",
    "builtins getattr",
    "collections  OrderedDict",
    "numpy.core.multiarray _reconstruct",
    "e" * 5000 + " e",
  ],
)
def test_other_globals_are_refused(tmp_path, name):
  content = b"c" + name.replace(" ", "\n", 1).encode() + b"\n"
  path = _torch_file(tmp_path / "a.pth", content)
  _refused(path, f"asks for '{name.replace(' ', '.', 1)[:10]}")


def _repeat(count, content):
  return content * count


PROGRAMS = {
  # Executed, these would crash the process or take all memory.
  "deep tuple as a key": b"})" + _repeat(200_000, b"\x85") + b"Ns",
  "deep tuple as a storage's key": b"("
  + _op("storage")
  + b"ctorch\nFloatStorage\n"
  b")" + _repeat(200_000, b"\x85") + b"NK\1tQ",
  "large bytearray": b"\x96" + struct.pack("<Q", 1 << 40),
  "large bytes": b"\x8e" + struct.pack("<Q", 1 << 62),
  "large string": b"X\xff\xff\xff\x7fa",
  "long integer": b"\x8b" + struct.pack("<i", 1000) + bytes(999) + b"\1",
  "integer of 72 bits": b"\x8a\x09" + bytes(8) + b"\1",
  "bad float": b"F" + _repeat(5000, b"x") + b"\n",
  "copies of a list": b"ctorch\nSize\n](" + _repeat(9, b"N") + b"e\x85R",
  "dict with arguments": b"ccollections\nOrderedDict\n" + _op(([],)) + b"R",
  # Calls, states and items in places where `torch.save` has none.
  "call of a dtype": b"ctorch\nFloatStorage\n" + _op(("V9999999",)) + b"R",
  "call of a string": _op("eval") + _op(("1",)) + b"R",
  "call without a tuple": b"ctorch\nSize\n" + _op([()]) + b"R",
  "state of a dict": b"}}b",
  "state of a function": b"ctorch._utils\n_rebuild_tensor_v2\n}b",
  "state of a tensor": _tensor() + _op({"offset": 1 << 20}) + b"b",
  "state of nothing": b"}b",
  "items of a tuple": b")" + _op("a") + b"Ns",
  "items of a list": b"]Na" + _op(0) + b"Ns",
  "items of a tensor": _tensor() + b"(" + _op("a") + b"Nu",
  "list items of a dict": b"}Na",
  "odd items": b"}(Nu",
  "new object": b"ccollections\nOrderedDict\n)\x81",
  "instance": b"(icollections\nOrderedDict\n",
  "extension": b"\x82\1",
  "persistent id by name": b"P0\n",
  "empty stack": b"\x85",
  "nothing at the mark": b"t",
  "unknown memo": b"h\7",
  "unknown opcode": b"\xfe",
  "no stop": b"}X\1\0\0",
  "bad string": b"X\2\0\0\0\xff\xff",
  "parameter of nothing": b"ctorch._utils\n_rebuild_parameter\n)R",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_pickles_that_torch_does_not_write_are_refused(tmp_path, name):
  path = _torch_file(tmp_path / "a.pth", PROGRAMS[name])
  _refused(path, r"damaged or malicious|its pickle has the opcode")


def test_recursive_containers_are_read_in_bounded_memory(tmp_path):
  layers = (
    b"](" + _repeat(100, b"h" + bytes([i])) + b"eq" + bytes([i + 1])
    for i in range(50)
  )
  laughs = b"](Nq\0" + b"".join(layers) + b"e"
  # A memo that is an array would take 32 GiB for this index.
  loop = b"]r\xff\xff\xff\xffj\xff\xff\xff\xffa"
  content = _dict(laughs=laughs, loop=loop, model=_dict(a=_tensor()))
  _assert_equal(reader.read(_torch_file(tmp_path / "a", content)), {"a": FOUR})


@pytest.mark.parametrize(
  "content",
  [
    _tensor((5,)),
    _tensor((4,), offset=1),
    _tensor((2,), (4,)),
    _tensor((2, 2), (3, 2)),
    _tensor((1 << 40,), (0,)),
    _tensor((5,), (0,)),
    _tensor((), (), 4),
    _tensor((0,), (1,), 5),
    _tensor((4,), offset=-1),
    _tensor((-1,)),
    _tensor((2,), (-1,), 3),
    _tensor((4,), (1 << 61,)),
    _tensor((1,), (1 << 61,)),
    _tensor((1 << 40, 1 << 40, 0), (0, 0, 0)),
    _tensor((4,), ()),
    _tensor((1,) * 65, (1,) * 65),
    _tensor([4], [1]),
    _tensor(4, 1),
    _tensor((4.0,)),
    _tensor((True,)),
    _tensor(offset=None),
    _tensor(storage=_storage(count=5)),
    _tensor(storage=_storage(count=-1)),
    _tensor(storage=_storage(count=1 << 62)),
    _tensor(storage=_storage(count=4.0)),
    _tensor(storage=_storage(key="1")),
    _tensor(storage=_storage(key="../data.pkl")),
    _tensor(storage=_storage(key=0)),
    _tensor(storage=_storage(kind="module")),
    _tensor(storage=_storage(storage=_op("FloatStorage"))),
    _tensor(storage=_storage(storage=b"ctorch\nDoubleStorage\n")),
    _tensor(storage=_op("storage")),
    _tensor(storage=_tensor()),
    _tensor(rest=_tensor() + _tensor()),
  ],
)
def test_tensors_outside_their_storage_are_refused(tmp_path, content):
  path = _torch_file(tmp_path / "a.pth", _dict(a=content))
  _refused(path, "is damaged or malicious")


GOOD = _program(_dict(a=_tensor()))
PICKLE = _Member("archive/data.pkl", GOOD)
DATA = _Member("archive/data/0", FOUR.tobytes())


@pytest.mark.parametrize(
  "members, message",
  [
    ((PICKLE, DATA, DATA), "there are two members 'archive/data/0'"),
    (
      (PICKLE, DATA._replace(start=0)),
      "headers of member 'archive/data/0' differ",
    ),
    ((PICKLE, DATA, _Member("archive/data/1", start=5)), "headers of member"),
    ((PICKLE, DATA._replace(local_name="archive/data/1")), "headers of member"),
    ((PICKLE, DATA._replace(local_method=8)), "headers of member"),
    ((PICKLE, DATA._replace(start=1 << 30)), "damaged"),
    ((PICKLE, DATA._replace(stored_size=9999)), "overlaps another or the file"),
    (
      (_Member("a", b"x" * 40), _Member("a", start=0)),
      "overlaps another",
    ),
    (
      (PICKLE, _Member("archive/data/0", bytes(8), 16)),
      "claims to inflate from 8 to 16",
    ),
    (
      (PICKLE, _Member("archive/data/0", bytes(16), method=12)),
      "other than deflate",
    ),
    ((PICKLE, _Member("archive/data/0", bytes(16), flags=1)), "is encrypted"),
    ((PICKLE,), r"expected 4 elements of float32 in data/0, found 0 bytes"),
    ((DATA,), r"expected one member <name>/data\.pkl, found 0"),
    ((), r"expected one member <name>/data\.pkl, found 0"),
    ((PICKLE, DATA, _Member("b/data.pkl")), r"data\.pkl, found 2"),
    ((PICKLE, DATA, _Member("archive/byteorder", b"big")), "big-endian"),
    ((PICKLE, DATA, _Member("archive/byteorder", b"bigger")), "big-endian"),
    (
      (PICKLE, _Member("n" * 60_000), _Member("n" * 60_000)),
      "two members 'nnn",
    ),
    ((PICKLE, DATA, _Member("archive/constants.pkl")), "TorchScript"),
    ((PICKLE, DATA, _Member("archive/code/a.py")), r"torch\.jit\.load\(\"/"),
    (
      (_Member("archive/data.pkl", bytes(9 << 20)),),
      "data.pkl has 9437184 bytes",
    ),
  ],
)
def test_zip_files_that_torch_does_not_write_are_refused(
  tmp_path, members, message
):
  _refused(_zip(tmp_path / "a.pth", *members), message)


@pytest.mark.parametrize(
  "content, message",
  [
    (b"", "found 0 bytes; compare its size"),
    (
      b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
      "as PyTorch wrote before 1.6",
    ),
    (b"\n<!DOCTYPE html><html>", "a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b"GGUF\3\0\0\0", "GGUF"),
    (b"\x93NUMPY\1\0", "NumPy array"),
    (b"\x1f\x8b\x08\0", "gzip"),
    (b'{"model_type": "blip"}', "JSON file"),
    (bytes(100), r"starts with b'\\x00"),
    (b"PK", "damaged"),
  ],
)
def test_other_formats_are_recognised_by_content(tmp_path, content, message):
  path = tmp_path / "model.pth"
  path.write_bytes(content)
  _refused(path, message)


def test_a_legacy_file_is_refused_with_a_command_that_converts_it(tmp_path):
  path = tmp_path / "a.pth"
  path.write_bytes(b"\x80\x02.")
  with pytest.raises(ValueError) as error:
    reader.read(path)
  assert (
    f"python -c \"import torch; torch.save(torch.load('{path}', "
    "map_location='cpu', weights_only=True), 'NEW')\""
  ) in str(error.value)


@pytest.mark.parametrize(
  "entries, message",
  [
    ({"a": _entry(shape=(5,))}, "damaged"),
    ({"a": _entry(span=(0, 20), shape=(5,))}, "damaged"),
    ({"a": _entry(), "b": _entry()}, "damaged"),
    ({"a": _entry(dtype="F8_E4M3", shape=(16,))}, "'a' has the dtype F8_E4M3"),
    ({"a": {"dtype": "F32"}}, "damaged"),
    ({"a": 1}, "damaged"),
    ({}, "damaged"),
  ],
)
def test_invalid_safetensors_are_refused(tmp_path, entries, message):
  _refused(_safetensors(tmp_path / "a", entries, FOUR.tobytes()), message)


def _small(folder):
  arrays = {
    "a": helpers.random_array((2, 3)),
    "b.weight": helpers.random_array((3,), ml_dtypes.bfloat16),
  }
  tensor_files.save_torch(folder / "a.pth", arrays, {"c": "a"})
  entries = {"a": _entry(), "b": _entry("I64", (2,), (16, 32))}
  _safetensors(folder / "a.safetensors", entries, FOUR.tobytes() * 2)
  return folder / "a.pth", folder / "a.safetensors"


@pytest.mark.parametrize("part", range(20))
def test_a_truncated_file_is_refused(tmp_path, part):
  for path in _small(tmp_path):
    size = path.stat().st_size
    os.truncate(path, size * part // 20 if part else size - 1)
    _refused(path, "damaged|expected a file of torch.save")


@pytest.mark.parametrize("seed", range(4))
def test_changed_bytes_give_other_values_or_an_error(tmp_path, seed):
  rng = random.Random(seed)
  errors = 0
  for path in _small(tmp_path):
    original = path.read_bytes()
    for _ in range(250):
      content = bytearray(original)
      for _ in range(rng.choice((1, 1, 2, 8))):
        content[rng.randrange(len(content))] = rng.choice(
          (0, 1, 255, rng.randrange(256))
        )
      path.unlink()
      path.write_bytes(content)
      try:
        for name, array in (tensors := reader.read(path)).items():
          assert array.shape == tensors.shape(name)
          assert len(array.tobytes()) == array.size * array.dtype.itemsize
      except ValueError:
        errors += 1
  assert 100 < errors < 500, "both outcomes occur"


def test_files_of_a_folder_are_tried_in_order_of_preference(tmp_path):
  with pytest.raises(ValueError, match="holds no checkpoint: expected one of"):
    reader.read(tmp_path)
  with pytest.raises(ValueError, match="no such file or directory"):
    reader.read(tmp_path / "a.pth")
  # Each is preferred to the previous ones.
  for name in ("model.pth", "pytorch_model.bin"):
    tensor_files.save_torch(tmp_path / name, {name: FOUR})
    assert list(reader.read(str(tmp_path))) == [name]
  _safetensors(tmp_path / "model.safetensors", {"s": _entry()}, FOUR.tobytes())
  assert list(reader.read(tmp_path)) == ["s"]


def _index(folder, weight_map, name="model.safetensors.index.json"):
  text = json.dumps({"metadata": {}, "weight_map": weight_map})
  (folder / name).write_text(text)
  return folder / name


def test_shards_are_read_as_one_checkpoint(tmp_path):
  shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
  for i, shard in enumerate(shards):
    data = (FOUR + i).tobytes()
    _safetensors(tmp_path / shard, {f"t{i}": _entry()}, data)
  path = _index(tmp_path, {"t1": shards[1], "t0": shards[0]})
  for tensors in (reader.read(tmp_path), reader.read(path)):
    _assert_equal(tensors, {"t1": FOUR + 1, "t0": FOUR})
    assert tensors.path == path
  path.unlink()
  tensor_files.save_torch(tmp_path / "a.bin", {"a": FOUR})
  path = _index(tmp_path, {"a": "a.bin"}, "pytorch_model.bin.index.json")
  _assert_equal(reader.read(tmp_path), {"a": FOUR})


@pytest.mark.parametrize(
  "shard",
  [
    "../a.bin",
    "/tmp/a.bin",
    "b/a.bin",
    "..",
    "",
    "..\\a.bin",
    ".a.bin",
    7,
    None,
  ],
)
def test_an_index_cannot_name_files_outside_its_folder(tmp_path, shard):
  (tmp_path / "b").mkdir()
  for folder in (tmp_path, tmp_path / "b"):
    tensor_files.save_torch(folder / "a.bin", {"a": FOUR})
  path = _index(tmp_path / "b", {"a": shard})
  _refused(path, "expected the plain name of a file in the same folder")


def test_an_index_without_its_shards_is_refused(tmp_path):
  _refused(_index(tmp_path, {"a": "a.bin"}), r"needs a\.bin in the same folder")
  tensor_files.save_torch(tmp_path / "a.bin", {"a": FOUR})
  _refused(_index(tmp_path, {"b": "a.bin"}), r"1 of 1 tensors are not in")
  _refused(_index(tmp_path, {}), r"0 of 0 tensors")
  for text in ("", "[]", "{}", "[" * 100_000, '{"weight_map": 1}'):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    _refused(
      tmp_path / "model.safetensors.index.json", 'JSON with "weight_map"'
    )


@pytest.mark.parity
def test_files_written_by_torch_are_read(tmp_path):
  torch = pytest.importorskip("torch", reason="needs the extra [parity]")
  base = torch.arange(24.0)
  model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
  optimizer = torch.optim.AdamW(model.parameters())
  model(torch.ones(2, 3)).sum().backward()
  optimizer.step()
  views = {
    "base": base,
    "same": base[:],
    "slice": base[5:9],
    "matrix": base.view(4, 6),
    "transposed": base.view(4, 6).T,
    "permuted": base.view(2, 3, 4).permute(2, 0, 1)[1:],
    "expanded": torch.ones(1).expand(1, 1),
    "parameter": torch.nn.Parameter(torch.ones(2)),
  }
  for dtype in helpers.TORCH_DTYPES:
    for shape in helpers.ARRAY_SHAPES:
      tensor = torch.ones(shape).to(getattr(torch, str(np.dtype(dtype))))
      views[f"{np.dtype(dtype)}{shape}"] = tensor
  state_dict = model.state_dict()
  state_dict.update(views)
  path = tmp_path / "a.pth"
  saved = {
    "model": state_dict,
    "optimizer": optimizer.state_dict(),
    "config": {"lr": 1e-5, "sizes": [1, 2], "name": None, "big": 1 << 40},
    "epoch": 3,
  }
  torch.save(saved, path)
  tensors = reader.read(path)
  assert tensors.ignored == ["optimizer", "config", "epoch"]
  assert list(tensors) == list(state_dict)
  for name, tensor in state_dict.items():
    expected = tensor.detach()
    assert tensors.shape(name) == tuple(expected.shape), name
    assert f"torch.{tensors.dtype(name)}" == str(expected.dtype), name
    raw = expected.contiguous().reshape(-1).view(torch.uint8).numpy()
    assert tensors[name].tobytes() == raw.tobytes(), name
  assert tensors.alias("base") == tensors.alias("same")
  assert tensors.alias("base") != tensors.alias("matrix")
  assert tensors.alias("matrix") != tensors.alias("transposed")
  # A legacy file, and a module instead of a state dict.
  torch.save(state_dict, path, _use_new_zipfile_serialization=False)
  _refused(path, "as PyTorch wrote before 1.6")
  torch.save(model, path)
  _refused(path, r"asks for 'torch\.nn\.modules\.container\.Sequential'")


@pytest.mark.parity
def test_golden_checkpoints_are_read_as_by_torch(shared_dir):
  torch = pytest.importorskip("torch", reason="needs the extra [parity]")
  folder = shared_dir / "goldens" / "ckpt"
  paths = sorted(folder.glob("*.pth"))
  assert paths
  for path in paths:
    saved = torch.load(path, weights_only=True)
    expected = {k: v.numpy() for k, v in saved["model"].items()}
    tensors = reader.read(path)
    _assert_equal(tensors, expected)
    places = {k: v.data_ptr() for k, v in saved["model"].items() if v.numel()}
    for a, b in itertools.combinations(places, 2):
      tied = tensors.alias(a) == tensors.alias(b)
      assert tied == (places[a] == places[b]), (path, a, b)


@pytest.mark.parametrize(
  "keys",
  [
    ("model",),
    ("state_dict",),
    ("model_state_dict",),
    ("net",),
    ("params",),
    ("ema",),
    ("module",),
    ("network",),
    ("model_state",),
    ("weights",),
    ("ema_model",),
    ("checkpoint", "state_dict"),
    ("model", "state_dict"),
    ("state_dict", "model"),
  ],
)
def test_weights_under_a_key_are_found(tmp_path, keys):
  content = _dict(a=_tensor())
  for key in reversed(keys):
    content = _dict(epoch=_op(3), **{key: content})
  path = _torch_file(tmp_path / "a.pth", content)
  tensors = reader.read(path)
  assert list(tensors) == ["a"]
  assert tensors.ignored == ["epoch"] * len(keys)


def test_two_sets_of_weights_are_refused(tmp_path):
  weights = _dict(a=_tensor())
  path = _torch_file(tmp_path / "a.pth", _dict(model=weights, ema=weights))
  with pytest.raises(ValueError, match="'model' and 'ema' each hold weights"):
    reader.read(path)
  # Hyper-parameters are no weights.
  path = _torch_file(
    tmp_path / "a.pth", _dict(params=_dict(lr=_op(0.1)), net=weights)
  )
  assert list(reader.read(path)) == ["a"]
