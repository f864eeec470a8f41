"""Hostile and cut companion files of weights: configs and vocabularies."""

import json
import os
import pathlib
import random
import shutil
from collections.abc import Iterator
from typing import Any

VALUES = (
  None,
  True,
  False,
  0,
  -1,
  1,
  7,
  1.5,
  2**31,
  2**63,
  10**400,
  float("nan"),
  float("inf"),
  "",
  "gelu",
  "../../x",
  "x" * 100_000,
  [],
  [1, 2],
  [None],
  [[[]]],
  {},
  {"content": 5},
  {"a": {"b": {}}},
)


def _paths(value: Any, at: tuple = ()) -> Iterator[tuple]:
  """The place of every value inside a value."""
  items = value.items() if isinstance(value, dict) else enumerate(value)
  for key, inner in items:
    yield (*at, key)
    if isinstance(inner, dict | list):
      yield from _paths(inner, (*at, key))


def _put(value: Any, at: tuple, new: Any) -> Any:
  value = json.loads(json.dumps(value))
  inner = value
  for key in at[:-1]:
    inner = inner[key]
  inner[at[-1]] = new
  return value


def bytes_of_any_file(rng: random.Random, sound: bytes) -> bytes:
  """Faults that a file can have whatever its content is."""
  cut = rng.randrange(len(sound))
  flipped = bytearray(sound)
  flipped[cut] ^= 1 << rng.randrange(8)
  return rng.choice(
    (
      b"",
      b"\0" * 100,
      sound[:cut],
      sound[:cut],
      sound[:cut] + b"\xff\xfe" + sound[cut:],
      b"\xef\xbb\xbf" + sound,
      sound.decode().encode("utf-16"),
      sound + sound,
      bytes(flipped),
      bytes(flipped),
      rng.randbytes(1000),
    )
  )


def bytes_of_json(rng: random.Random, sound: bytes) -> bytes:
  """Faults of JSON: types of values, nesting, numbers, repeated keys."""
  value = json.loads(sound)
  places = list(_paths(value))
  kind = rng.randrange(12)
  if kind == 0 or not places:
    deep = 100_000
    return rng.choice(
      (
        b"[" * deep,
        b'{"a":' * deep,
        b"[" * deep + b"]" * deep,
        b"null",
        b"[]",
        b"1",
        b'"text"',
        b"NaN",
        b"9" * 5000,
        b'{"a": 1e400}',
      )
    )
  place = rng.choice(places)
  if kind == 1:
    # The first key twice, with another value.
    key = json.dumps(str(places[0][0])).encode()
    return b"{" + key + b": 1," + sound.lstrip()[1:]
  if kind == 2:
    deep = b"[" * 50_000 + b"]" * 50_000
    return (
      json.dumps(_put(value, place, "DEEP")).encode().replace(b'"DEEP"', deep)
    )
  if kind == 3:
    number = rng.choice((b"1e400", b"-1e400", b"9" * 4000, b"9" * 5000))
    return (
      json.dumps(_put(value, place, "HUGE")).encode().replace(b'"HUGE"', number)
    )
  if kind == 4 and isinstance(place[-1], str):
    inner = value
    for key in place[:-1]:
      inner = inner[key]
    del inner[place[-1]]
    return json.dumps(value).encode()
  return json.dumps(_put(value, place, rng.choice(VALUES))).encode()


def no_file(rng: random.Random, path: pathlib.Path) -> None:
  """Puts something in the place of a file that is none, or not a small one."""
  path.unlink()
  match rng.randrange(4):
    case 0:
      path.mkdir()
    case 1:
      os.mkfifo(path)
    case 2:
      path.symlink_to("/dev/zero")
    case 3:
      with path.open("wb") as file:
        file.truncate(1 << 40)


def cases(
  seed: int, count: int, folder: pathlib.Path, names: list[str]
) -> Iterator[tuple[str, str]]:
  """Damages files of a folder, one at a time, and restores them.

  Yields:
    The name of a file, and a text that says how it was damaged.
  """
  rng = random.Random(seed)
  for number in range(count):
    name = names[number % len(names)]
    path = folder / name
    sound = path.read_bytes()
    kind = rng.random()
    if kind < 0.1:
      no_file(rng, path)
      what = "no file"
    else:
      make = bytes_of_any_file
      if name.endswith(".json") and kind < 0.75:
        make = bytes_of_json
      content = make(rng, sound)
      path.write_bytes(content)
      what = repr(content[:300])
    yield name, f"{number}: {name}: {what}"
    if path.is_dir():
      shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.write_bytes(sound)
