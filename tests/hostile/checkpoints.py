"""Mutated checkpoints: files of PyTorch and safetensors, and steps of a run.

Mutations of bytes are what disks and transfers do, mutations of the pickle, the
zip directory and the header what somebody does on purpose.
"""

import io
import json
import pathlib
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable, Iterator

import numpy as np
import safetensors.numpy

from blip_jax.convert import tensor_files

TENSORS = {
  "visual_encoder.pos_embed": np.arange(40, dtype=np.float32).reshape(5, 8),
  "ids": np.arange(12, dtype=np.int64),
  "half": np.linspace(-1, 1, 30, dtype=np.float16).reshape(2, 3, 5),
  "temp": np.float32(0.07).reshape(()),
  "none": np.zeros((0, 4), np.float32),
}


def sound(folder: pathlib.Path) -> tuple[bytes, bytes]:
  """The bytes of a .pth and of a .safetensors file with `TENSORS`."""
  tensor_files.save_torch(folder / "sound.pth", TENSORS, {"tied": "ids"})
  return (
    (folder / "sound.pth").read_bytes(),
    safetensors.numpy.save({k: np.asarray(v) for k, v in TENSORS.items()}),
  )


# Mutations of any bytes.


def _flip(rng: random.Random, content: bytearray) -> None:
  for _ in range(rng.choice((1, 1, 2, 8, 64))):
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def _overwrite(rng: random.Random, content: bytearray) -> None:
  start, size = rng.randrange(len(content)), rng.choice((1, 2, 4, 8, 100))
  fill = rng.choice((b"\0", b"\xff", b"\x7f", rng.randbytes(1)))
  content[start : start + size] = fill * len(content[start : start + size])


def _cut(rng: random.Random, content: bytearray) -> None:
  del content[rng.randrange(len(content)) :]


def _delete(rng: random.Random, content: bytearray) -> None:
  start = rng.randrange(len(content))
  del content[start : start + rng.choice((1, 2, 8, 64, 1000))]


def _insert(rng: random.Random, content: bytearray) -> None:
  start = rng.randrange(len(content))
  content[start:start] = rng.randbytes(rng.choice((1, 2, 8, 64, 1000)))


def _repeat(rng: random.Random, content: bytearray) -> None:
  start, to = rng.randrange(len(content)), rng.randrange(len(content))
  content[to:to] = content[start : start + rng.choice((4, 30, 300))]


def _number(rng: random.Random, content: bytearray) -> None:
  """An extreme number where there may be an offset or a size."""
  code = rng.choice(("<H", "<I", "<Q", ">I"))
  largest = 256 ** struct.calcsize(code) - 1
  number = rng.choice((0, 1, largest, largest // 2, largest // 2 + 1))
  start = rng.randrange(len(content))
  content[start : start + struct.calcsize(code)] = struct.pack(code, number)


_BYTES = (_flip, _flip, _overwrite, _cut, _delete, _insert, _repeat, _number)


def mutated_bytes(rng: random.Random, sound: bytes) -> bytes:
  content = bytearray(sound)
  rng.choice(_BYTES)(rng, content)
  return bytes(content)


# Mutations of the program that a pickle is.


def _calls(marker: pathlib.Path) -> list[bytes]:
  """Programs that would create the marker, if anything ran them."""
  command = f"open({str(marker)!r}, 'w')"
  argument = pickle.dumps(command, 2)[2:-1]
  shell = pickle.dumps(f"touch {marker}", 2)[2:-1]
  return [
    b"cbuiltins\neval\n" + argument + b"\x85R",
    b"cbuiltins\nexec\n(" + argument + b"tR",
    b"cos\nsystem\n" + shell + b"\x85R",
    b"(" + shell + b"ios\nsystem\n",
    b"\x8c\x02os\x8c\x06system\x93" + shell + b"\x85R",
    b"cpathlib\nPath\n" + pickle.dumps(str(marker), 2)[2:-1] + b"\x81",
    b"ctorch._utils\n_rebuild_tensor_v2\n" + argument + b"\x85R",
    b"ccollections\nOrderedDict\n)R" + argument + b"b",
    b"ctorch.hub\nload\n" + argument + b"\x85R",
  ]


_BOMBS = (
  b"(" * 100_000,
  b")" + b"\x85" * 100_000,
  b"]" + b"a" * 1000,
  b"r\xff\xff\xff\x7f",  # a memo index of 2 ** 31
  b"\x8a\xff" + b"\xff" * 255,
  b"\x8b\xff\xff\xff\x7f",
  b"X\xff\xff\xff\x7f",
  b"\x8e" + b"\xff" * 8,
  b"I" + b"9" * 5000 + b"\n",
  b"G" + struct.pack(">d", float("nan")),
  b"]q\x01h\x01a" * 1000,
  b"}q\x01h\x01h\x01s",
)


def _mutated_program(
  rng: random.Random, program: bytes, marker: pathlib.Path
) -> bytes:
  starts = [p for _, _, p in pickletools.genops(program) if p is not None]
  ops = [
    program[start:end]
    for start, end in zip(starts, [*starts[1:], len(program)], strict=True)
  ]
  where = rng.randrange(len(ops))
  match rng.randrange(7):
    case 0:
      ops.insert(where, rng.choice(_calls(marker)))
    case 1:
      ops.insert(where, rng.choice(_BOMBS))
    case 2:
      del ops[where : where + rng.choice((1, 1, 2, 10))]
    case 3:
      ops.insert(where, ops[rng.randrange(len(ops))])
    case 4:
      other = rng.randrange(len(ops))
      ops[where], ops[other] = ops[other], ops[where]
    case 5:
      ops[where] = bytes([rng.randrange(256)]) + ops[where][1:]
    case 6:
      ops[where] = pickle.dumps(
        rng.choice((-1, 2**31, 2**63, 2**70, 1.5, "x", None, (), (2**40,) * 9)),
        2,
      )[2:-1]
  return b"".join(ops)


def mutated_pickle(
  rng: random.Random, sound: bytes, marker: pathlib.Path
) -> bytes:
  """A zip file as torch writes it, with another pickle or other members."""
  with zipfile.ZipFile(io.BytesIO(sound)) as archive:
    members = {name: archive.read(name) for name in archive.namelist()}
  (pickled,) = [name for name in members if name.endswith("data.pkl")]
  members[pickled] = _mutated_program(rng, members[pickled], marker)
  names = list(members)
  if rng.random() < 0.2:
    name = rng.choice(names)
    renamed = rng.choice(
      ("x", "/", "../x", "archive/data/0", "archive/code/x.py", "a" * 5000)
    )
    members[renamed] = members.pop(name)
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    for name, content in members.items():
      if rng.random() < 0.02:
        content = content[: len(content) // 2] if rng.random() < 0.5 else b""
      method = rng.choice((0, 0, 0, 0, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
      archive.writestr(name, content, method)
  return file.getvalue()


# Mutations of the header of safetensors.

VALUES = (
  None,
  True,
  -1,
  0,
  1.5,
  2**31,
  2**63,
  2**64,
  10**400,
  "",
  "F32",
  "x" * 10_000,
  [],
  [-1, 2**40],
  [[]],
  {},
  {"dtype": "F32"},
)


def mutated_header(rng: random.Random, sound: bytes) -> bytes:
  length = int.from_bytes(sound[:8], "little")
  header, data = json.loads(sound[8 : 8 + length]), sound[8 + length :]
  name = rng.choice([name for name in header if name != "__metadata__"])
  key = rng.choice(("dtype", "shape", "data_offsets"))
  match rng.randrange(6):
    case 0:
      header[name][key] = rng.choice(VALUES)
    case 1:
      header[name] = rng.choice(VALUES)
    case 2:
      del header[name][key]
    case 3:
      header["__metadata__"] = rng.choice(VALUES)
    case 4:
      header[rng.choice(("", "x" * 5000, "\0", "a/../b"))] = header[name]
    case 5:
      values = header[name][rng.choice(("shape", "data_offsets"))]
      if values:
        number = rng.choice([v for v in VALUES if not isinstance(v, dict)])
        values[rng.randrange(len(values))] = number
  text = json.dumps(header).encode()
  if rng.random() < 0.1:
    text = b"[" * 100_000 if rng.random() < 0.5 else text[: len(text) // 2]
  text += b" " * (-len(text) % 8)
  claimed = (
    len(text) if rng.random() < 0.9 else rng.choice((0, 1, 2**40, 2**63))
  )
  return struct.pack("<Q", claimed) + text + data


def cases(
  seed: int, count: int, folder: pathlib.Path, marker: pathlib.Path
) -> Iterator[tuple[str, bytes]]:
  """Names and bytes of mutated files.

  Names begin with `bytes_` where the sound file's tensors, or an error, are
  right, and with `made_` where the file may say something else.
  """
  rng = random.Random(seed)
  torch, safe = sound(folder)
  kinds: list[tuple[str, Callable[[], bytes]]] = [
    ("bytes_{}.pth", lambda: mutated_bytes(rng, torch)),
    ("made_{}.pth", lambda: mutated_pickle(rng, torch, marker)),
    ("bytes_{}.safetensors", lambda: mutated_bytes(rng, safe)),
    ("made_{}.safetensors", lambda: mutated_header(rng, safe)),
  ]
  for number in range(count):
    name, make = kinds[number % len(kinds)]
    yield name.format(number), make()


def _changed(rng: random.Random, array: np.ndarray) -> np.ndarray:
  return rng.choice(
    (
      array.reshape(-1),
      array[None],
      array.T,
      array.reshape(-1)[:1],
      array[:0],
      np.ones((), np.float32),
      np.zeros(rng.sample(range(9), 3), np.float32),
      np.stack([array, array]),
      array.astype(rng.choice((np.int64, np.bool_, np.float16))),
      np.full(array.shape, np.nan, np.float32),
    )
  )


def mutated_tensors(
  rng: random.Random, sound: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """The tensors of a model, some of other shapes, types or names."""
  tensors = dict(sound)
  for _ in range(rng.choice((1, 1, 2, 3))):
    name = rng.choice(list(tensors))
    array = tensors[name]
    match rng.randrange(8):
      case 0:
        del tensors[name]
      case 1:
        other = rng.choice(("", "x", "module." + name, name + ".weight"))
        tensors[other] = tensors.pop(name)
      case 2:
        tensors[rng.choice(list(sound))] = array
      case _:
        tensors[name] = _changed(rng, array)
  return tensors


def flipped_bits(
  seed: int, count: int, folder: pathlib.Path
) -> Iterator[tuple[pathlib.Path, int]]:
  """Flips bits of the files of a step, one at a time, and flips them back.

  Yields:
    The file, and the number of the bit that is another now.
  """
  rng = random.Random(seed)
  paths = sorted(p for p in folder.glob("**/*") if p.is_file())
  paths = [path for path in paths if path.stat().st_size]
  for _ in range(count):
    path = rng.choice(paths)
    content = path.read_bytes()
    bit = rng.randrange(8 * len(content))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    yield path, bit
    path.write_bytes(content)
