"""Index of a tar shard: which members are a sample, and where they are.

As in webdataset, members that share a name up to its first dot are a sample. A
name may contain further dots, though: `22.05.jpg` is image 22.05, unless there
is a `22.jpg` and no caption of its own: then it is another image of sample 22,
such as a mask (`22.seg.png`), and is not used.
"""

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from blip_jax.data import offsets, tar_headers, transforms
from blip_jax.runtime import files

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


class Index:
  """The samples of a tar shard, and what else is in it.

  All is in one array, which is mapped if it comes from a cache. Names are one
  after the other in it: a long one takes no room in the rows of the others.

  Args:
    array: from `_packed`.
    keep: endings of further members that it has.
  """

  def __init__(self, array: Int[np.ndarray, " n"], keep: Sequence[str] = ()):
    self._mapped = offsets.Mapped(array)
    self._columns = _columns(keep)

  def __len__(self) -> int:
    return int(self._mapped.array[0])

  @property
  def _rows(self) -> Int[np.ndarray, "rows columns"]:
    """Spans of the key and of each field; samples first."""
    array, width = self._mapped.array, 2 * len(self._columns) + 2
    return array[2 : 2 + int(array[1]) * width].reshape(-1, width)

  def key(self, row: int) -> str:
    start, size = self._rows[row, :2].tolist()
    names = self._mapped.array[2 + self._rows.size :].view(np.uint8)
    return os.fsdecode(names[start : start + size].tobytes())

  def span(self, row: int, field: str) -> tuple[int, int]:
    """Offset and size in bytes; -1 where the sample has no such member."""
    at = self._columns[field]
    offset, size = self._rows[row, at : at + 2].tolist()
    return offset, size

  def has(self, field: str) -> bool:
    """Whether any sample has such a member."""
    return bool((self._rows[: len(self), self._columns[field]] >= 0).any())

  def unused(self) -> list[tuple[str, int]]:
    """For each ending, a member that is not used and their number."""
    rows = range(len(self), len(self._rows))
    return [(self.key(row), self.span(row, _PARTS[0])[1]) for row in rows]


def cached(path: str, keep: Iterable[str] = ()) -> tuple[Index, list[str]]:
  """Returns `samples(path, keep)`, from a cache if the shard is large."""
  keep = tuple(keep)
  kind = f"samples{offsets.digest((*_USUAL, *_UNUSUAL, '', *keep))}"
  array, damage = offsets.cached(path, kind, lambda path: _packed(path, keep))
  return Index(array, keep), damage


def member_field(ending: str) -> str:
  """Returns the field of an index for members with an ending to keep."""
  return f"member:{ending.lower()}"


def samples(path: str, keep: Iterable[str] = ()) -> tuple[Index, list[str]]:
  """Finds the samples of a tar shard, and what else is in it.

  Only headers are read. After damage the scan continues at the next valid
  header, so that the samples after it are kept as well.

  Args:
    keep: endings of further members to find. They make no sample of their own.

  Returns:
    The index, with the fields image, text, json and each `member_field` of
    `keep`; and a list of damage.
  """
  keep = tuple(keep)
  array, damage = _packed(path, keep)
  return Index(array, keep), damage


def no_samples(keep: Iterable[str] = ()) -> Index:
  """The index of a shard that cannot be read."""
  return Index(np.zeros(2, np.int64), tuple(keep))


def endings(path: str) -> list[str]:
  """Returns the endings of a shard's members, each once."""
  members = tar_headers.members(path, tar_headers.Damage(path))
  names = (member.name for member in members)
  return list(dict.fromkeys(_first_ending(name)[1] for name in names))


class _Found:
  """What the members of a shard are.

  Attributes:
    samples: key -> part -> its member.
    kept: key -> field -> place of its member.
    unused: ending -> the first such member, and their number.

  Args:
    fields: those of members to keep.
    damage: gets members that are lost.
  """

  def __init__(self, fields: set[str], damage: tar_headers.Damage):
    self._fields = fields
    self._damage = damage
    # Key with a dot -> key up to its first dot.
    self._owners: dict[str, str] = {}
    self.samples: dict[str, dict[str, _Member]] = {}
    self.kept: dict[str, dict[str, tuple[int, int]]] = {}
    self.unused: dict[str, tuple[str, int]] = {}

  def add(self, member: tar_headers.Member) -> None:
    if member.is_folder:
      return
    if not member.is_file:
      return self._leave_out(member.name)
    owner, ending = _first_ending(member.name)
    key = owner
    if not self._is_known(ending) and os.path.basename(owner):
      key, ending = _last_ending(member.name)
    span = (member.offset, member.size)
    field = member_field(ending)
    if field in self._fields:
      self.kept.setdefault(key, {}).setdefault(field, span)
    part = _USUAL.get(ending) or _UNUSUAL.get(ending)
    if part:
      if key != owner:
        self._owners[key] = owner
      self._add_part(key, part, _Member(member.name, ending, span))
    elif field not in self._fields:
      self._leave_out(member.name)

  def _is_known(self, ending: str) -> bool:
    is_kept = member_field(ending) in self._fields
    return is_kept or ending in _USUAL or ending in _UNUSUAL

  def _add_part(self, key: str, part: str, member: _Member) -> None:
    sample = self.samples.setdefault(key, {})
    first = sample.setdefault(part, member)
    if first is member:
      return
    if first.ending in _USUAL and member.ending in _USUAL:
      name = tar_headers.shown(member.name)
      self._damage.add(f"{name}: a second {part} of {key!r:.200}")
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


def _packed(
  path: str, keep: Iterable[str]
) -> tuple[Int[np.ndarray, " n"], list[str]]:
  """Scans a shard; returns the array of an `Index`, and a list of damage."""
  columns, damage = _columns(keep), tar_headers.Damage(path)
  found = _Found(columns.keys() - set(_PARTS), damage)
  for member in tar_headers.members(path, damage):
    found.add(member)
  found.drop_second_images()
  if not found.samples:
    damage.add(f"no images or captions found{_advice(path)}")
  names = [os.fsencode(key) for key in found.samples]
  names += [os.fsencode(name) for name, _ in found.unused.values()]
  sizes = np.array([len(name) for name in names], np.int64)
  rows = np.full((len(names), 2 + 2 * len(columns)), -1, np.int64)
  rows[:, 0], rows[:, 1] = np.cumsum(sizes) - sizes, sizes
  for row, (key, sample) in zip(rows, found.samples.items(), strict=False):
    spans = {part: member.span for part, member in sample.items()}
    for field, span in (spans | found.kept.get(key, {})).items():
      row[columns[field] : columns[field] + 2] = span
  numbers = [number for _, number in found.unused.values()]
  rows[len(found.samples) :, columns[_PARTS[0]] + 1] = numbers
  blob = b"".join(names)
  blob += bytes(-len(blob) % rows.itemsize)
  counts = np.array([len(found.samples), len(rows)], np.int64)
  parts = [counts, rows.reshape(-1), np.frombuffer(blob, np.int64)]
  return np.concatenate(parts), damage.lines


def _columns(keep: Iterable[str]) -> dict[str, int]:
  """Where the span of each field is in a row; that of the key is first."""
  fields = dict.fromkeys((*_PARTS, *map(member_field, keep)))
  return {field: 2 * number for number, field in enumerate(fields, 1)}


def _advice(path: str) -> str:
  is_compressed = offsets.is_compressed(files.read_range(path, 0, 8))
  return "; it is compressed: decompress it first" if is_compressed else ""


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
