"""Index of a tar shard: which members are a sample, and where they are.

As in webdataset, members that share a name up to its first dot are a sample. A
name may contain further dots, though: `22.05.jpg` is image 22.05, unless there
is a `22.jpg` and no caption of its own: then it is another image of sample 22,
such as a mask (`22.seg.png`), and is not used.
"""

import os
import tarfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from blip_jax.data import offsets, transforms
from blip_jax.runtime import files

_CHUNK = 1 << 24
_PARTS = ("image", "text", "json")
# What is read of a shard. Anything else, pickles above all, is not.
_USUAL = {
  **dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image"),
  "txt": "text",
  "json": "json",
}
# Read where a sample lacks the usual ones.
_UNUSUAL = {
  **{ending.removeprefix("."): "image" for ending in transforms.ENDINGS},
  "caption": "text",
}


class _Member(NamedTuple):
  name: str
  ending: str
  span: tuple[int, int]  # offset and size in bytes


def cached(path: str, keep: Iterable[str]) -> tuple[np.ndarray, list[str]]:
  """Returns `samples(path, keep)`, from a cache if the shard is large."""
  keep = tuple(keep)
  kind = f"members{offsets.digest((*_USUAL, *_UNUSUAL, '', *keep))}"
  return offsets.cached(path, kind, lambda path: samples(path, keep))


def member_field(ending: str) -> str:
  """Returns the field of an index for members with an ending to keep."""
  return f"member:{ending.lower()}"


def samples(
  path: str, keep: Iterable[str] = ()
) -> tuple[np.ndarray, list[str]]:
  """Finds the samples of a tar shard, and what else is in it.

  Only headers are read. After damage the scan continues at the next valid
  header, so that the samples after it are kept as well.

  Args:
    keep: endings of further members to find. They make no sample of their own.

  Returns:
    The index, a structured array with `key` and, for image, text, json and each
    `member_field` of `keep`, offset and size in bytes (-1 where the sample has
    none), and at its end what `unused` returns; and a list of damage.
  """
  fields = {member_field(ending): None for ending in keep}  # ordered
  found = _Found(path, set(fields))
  for member in _members(path, found.damage):
    found.add(member)
  found.drop_second_images()
  if not found.samples:
    found.damage.append(f"{path}: no images or captions found")
  return _index(found, (*_PARTS, *fields)), found.damage


def num_samples(index: np.ndarray) -> int:
  """Returns how many rows of an index are samples; the others follow them."""
  number = len(index)
  while number and not any(_has(index[number - 1], part) for part in _PARTS):
    number -= 1
  return number


def unused(index: np.ndarray) -> list[tuple[str, int]]:
  """Returns, for each ending, a member that is not used and their number."""
  return [
    (os.fsdecode(bytes(row["key"])), int(row["image"][1]))
    for row in index[num_samples(index) :]
  ]


def endings(path: str) -> list[str]:
  """Returns the endings of a shard's members, each once."""
  names = (member.name for member in _members(path, []))
  return list(dict.fromkeys(_first_ending(name)[1] for name in names))


class _Found:
  """What the members of a shard are.

  Attributes:
    samples: key -> part -> its member.
    kept: key -> field -> place of its member.
    unused: ending -> the first such member, and their number.
    damage: what is damaged.
  """

  def __init__(self, path: str, fields: set[str]):
    self._path = path
    self._fields = fields
    # Key with a dot -> key up to its first dot.
    self._owners: dict[str, str] = {}
    self.samples: dict[str, dict[str, _Member]] = {}
    self.kept: dict[str, dict[str, tuple[int, int]]] = {}
    self.unused: dict[str, tuple[str, int]] = {}
    self.damage: list[str] = []

  def add(self, info: tarfile.TarInfo) -> None:
    if info.isdir():
      return
    if not info.isreg() or info.issparse():
      return self._leave_out(info.name)
    owner, ending = _first_ending(info.name)
    key = owner
    if not self._is_known(ending) and os.path.basename(owner):
      key, ending = _last_ending(info.name)
    span = (info.offset_data, info.size)
    field = member_field(ending)
    if field in self._fields:
      self.kept.setdefault(key, {}).setdefault(field, span)
    part = _USUAL.get(ending) or _UNUSUAL.get(ending)
    if part:
      if key != owner:
        self._owners[key] = owner
      self._add_part(key, part, _Member(info.name, ending, span))
    elif field not in self._fields:
      self._leave_out(info.name)

  def _is_known(self, ending: str) -> bool:
    is_kept = member_field(ending) in self._fields
    return is_kept or ending in _USUAL or ending in _UNUSUAL

  def _add_part(self, key: str, part: str, member: _Member) -> None:
    sample = self.samples.setdefault(key, {})
    first = sample.setdefault(part, member)
    if first is member:
      return
    if first.ending in _USUAL and member.ending in _USUAL:
      detail = f"{member.name}: a second {part} of {key!r}"
      self.damage.append(f"{self._path}: {detail}")
    elif member.ending in _USUAL:
      sample[part] = member
      self._leave_out(first.name)
    else:
      self._leave_out(member.name)

  def drop_second_images(self) -> None:
    """Drops samples that belong to another one; see the module's docstring."""
    for key, owner in self._owners.items():
      sample = self.samples[key]
      has_text = "text" in sample or "json" in sample
      has_owner = "image" in self.samples.get(owner, {})
      if "image" not in sample or (has_owner and not has_text):
        for member in self.samples.pop(key).values():
          self._leave_out(member.name)

  def _leave_out(self, name: str) -> None:
    ending = _last_ending(name)[1]
    first, number = self.unused.get(ending, (name, 0))
    self.unused[ending] = first, number + 1


def _index(found: _Found, fields: Iterable[str]) -> np.ndarray:
  keys = [os.fsencode(key) for key in found.samples]
  keys += [os.fsencode(name) for name, _ in found.unused.values()]
  longest = max(map(len, keys), default=1)
  index = np.full(
    len(keys),
    -1,
    [("key", f"S{longest}")] + [(field, np.int64, 2) for field in fields],
  )
  index["key"] = keys
  for row, (key, sample) in enumerate(found.samples.items()):
    spans = {part: member.span for part, member in sample.items()}
    for field, span in (spans | found.kept.get(key, {})).items():
      index[field][row] = span
  numbers = [number for _, number in found.unused.values()]
  index["image"][len(found.samples) :, 1] = numbers
  return index


def _has(row: np.void, field: str) -> bool:
  return bool(row[field][0] >= 0)


def _first_ending(name: str) -> tuple[str, str]:
  """Splits a name at the first dot; the ending is in lower case."""
  folder, _, name = name.rpartition("/")
  stem, _, ending = name.partition(".")
  return f"{folder}/{stem}" if folder else stem, ending.lower()


def _last_ending(name: str) -> tuple[str, str]:
  """Splits a name at the last dot; the ending is in lower case."""
  folder, _, name = name.rpartition("/")
  stem, dot, ending = name.rpartition(".")
  if not dot:
    stem, ending = ending, ""
  return f"{folder}/{stem}" if folder else stem, ending.lower()


def _members(path: str, damage: list[str]) -> Iterator[tarfile.TarInfo]:
  """Yields the intact members, and adds to `damage` what is not intact."""
  size = files.size(path)
  end = 0
  try:
    # Without `ignore_zeros`, tarfile takes a bad header for the end.
    with (
      files.open_read(path) as file,
      tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar,
    ):
      while member := tar.next():
        # tarfile keeps an object for every member here, which type stubs of
        # it do not list.
        vars(tar)["members"].clear()
        _report_gap(path, end, member.offset, damage)
        end = tar.offset
        if member.offset_data + member.size > size:
          damage.append(f"{path}: {member.name}: truncated")
          return
        yield member
  except tarfile.ReadError as error:
    damage.append(f"{path}: after byte {end}: {error}")
    return
  _report_gap(path, end, size, damage)


def _report_gap(path: str, begin: int, end: int, damage: list[str]) -> None:
  for at in range(begin, end, _CHUNK):
    if any(files.read_range(path, at, min(_CHUNK, end - at))):
      damage.append(f"{path}: bytes {begin} to {end} are not tar members")
      return
