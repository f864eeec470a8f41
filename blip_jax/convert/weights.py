"""A checkpoint of theirs as leaves of ours, and back; nothing is read until
somebody wants it.

Every name on both sides is matched by the table of `names.py`, left out under a
rule that has a name, or an error.
"""

import dataclasses
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from blip_jax.convert import names, reader

POSITION_IDS = "position ids are only counted"
AS_ASKED = "left out as asked"
TIED = "tied: the same tensor under another name"
LM_MATRIX_WINS = (
  "the LM matrix differs from the word embeddings that it should be: it wins, "
  "as in the original, where the later of the two is what is loaded"
)


@dataclasses.dataclass(frozen=True)
class Leaf:
  """An array that is read when it is called."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]
  # Equal for leaves that are the same memory, changed in the same way.
  memory: Hashable = None

  @classmethod
  def of(cls, array: Any) -> "Leaf":
    return cls(tuple(array.shape), np.dtype(array.dtype), lambda: array)

  def is_same(self, other: "Leaf") -> bool:
    """Whether both hold the same values; reads them only if it must."""
    if self.memory is not None and self.memory == other.memory:
      return True
    return np.array_equal(self.read(), other.read())

  def map(self, change: Callable[[np.ndarray], np.ndarray]) -> "Leaf":
    """The leaf after a change that moves elements but computes nothing new."""
    # Of an array of one element and no strides, so that this costs nothing.
    like = change(np.broadcast_to(np.zeros((), self.dtype), self.shape))
    memory = self.memory and (self.memory, change)
    return Leaf(like.shape, like.dtype, lambda: change(self.read()), memory)


Leaves = dict[str, Leaf]


@dataclasses.dataclass
class Report:
  """What became of every name.

  Attributes:
    matched: how many paths of ours have their values from theirs.
    dropped: rule -> names of theirs, or paths of ours, that it left out.
    changed: rule -> paths of ours that it made or altered.
    warnings: what a user should know before trusting the numbers.
  """

  matched: int = 0
  dropped: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  changed: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  warnings: list[str] = dataclasses.field(default_factory=list)

  def drop(self, rule: str, *which: str) -> None:
    self.dropped.setdefault(rule, []).extend(which)

  def change(self, rule: str, *which: str) -> None:
    self.changed.setdefault(rule, []).extend(which)

  def __str__(self) -> str:
    lines = [f"matched: {self.matched}"]
    for title, rules in (("dropped", self.dropped), ("changed", self.changed)):
      for rule, which in rules.items():
        lines.append(f"{title}: {len(which)} ({rule}): {some(which)}")
    lines += [f"warning: {text}" for text in self.warnings]
    # An error would have listed them.
    return "\n".join([*lines, "missing: 0", "unexpected: 0"])


def from_external(
  tensors: Mapping[str, Any],
  layout: str,
  report: Report,
  drop: Sequence[str] = (),
) -> Leaves:
  """Leaves of ours for every name of theirs.

  Args:
    tensors: names and arrays; a `reader.Tensors` is not read.
    layout: one of `names.LAYOUTS`.
    report: takes note of all names.
    drop: regular expressions for whole names that may be left out.

  Raises:
    ValueError: lists the names that the table does not know, or what is
      missing beside a tied name.
  """
  leaves, unknown = {}, []
  for name in tensors:
    if any(re.fullmatch(pattern, name) for pattern in drop):
      report.drop(AS_ASKED, name)
      continue
    match = names.of_theirs(name, layout)
    if match is None:
      if names.POSITION_IDS.fullmatch(name):
        report.drop(POSITION_IDS, name)
      elif name not in names.TIED or names.TIED[name] not in tensors:
        unknown.append(name)
      continue
    theirs, parts = _leaf(tensors, name), len(match.ours)
    if parts > 1 and theirs.shape[0] % parts:
      raise ValueError(
        f"{name}: {list(theirs.shape)} does not split into {parts} equal parts"
      )
    for i, path in enumerate(match.ours):
      leaf = theirs if parts == 1 else theirs.map(_part(i, parts))
      leaves[path] = leaf.map(match.rule.to_ours)
  if unknown:
    raise ValueError(
      f"{len(unknown)} names that no BLIP model has: {some(unknown, 20)}. Is "
      "this another architecture, or a wrapper that prefixes its names? What "
      "may be left out, name with --drop (drop=)"
    )
  for name, twin in names.TIED.items():
    if name in tensors and name not in report.dropped.get(AS_ASKED, ()):
      _settle(tensors, name, twin, layout, leaves, report)
  return leaves


def to_external(leaves: Leaves, layout: str) -> Leaves:
  """Leaves of theirs, by their names, for every path of ours.

  Raises:
    ValueError: lists the paths that their layout has no name for.
  """
  theirs, unknown = {}, []
  for path in leaves:
    match = names.of_ours(path, layout)
    if match is None:
      unknown.append(path)
    elif match.theirs not in theirs:
      parts = [leaves[name].map(match.rule.to_external) for name in match.ours]
      theirs[match.theirs] = parts[0] if len(parts) == 1 else _joined(parts)
  if unknown:
    raise ValueError(
      f"the layout {layout!r} has no name for {some(unknown, 20)}"
    )
  return theirs


def _settle(tensors, name, twin, layout, leaves, report) -> None:
  """Decides between two names of what should be one tensor."""
  leaf, other = _leaf(tensors, name), _leaf(tensors, twin)
  if leaf.shape != other.shape:
    raise ValueError(
      f"{name} {list(leaf.shape)} should be {twin} {list(other.shape)}; their "
      "shapes differ"
    )
  if leaf.is_same(other):
    report.drop(TIED, name)
    return
  (path,) = names.of_theirs(twin, layout).ours
  leaves[path] = leaf
  report.change(LM_MATRIX_WINS, path)
  report.warnings.append(f"{name}: {LM_MATRIX_WINS}")


def _leaf(tensors: Mapping[str, Any], name: str) -> Leaf:
  if not isinstance(tensors, reader.Tensors):
    return Leaf.of(tensors[name])
  return Leaf(
    tensors.shape(name),
    tensors.dtype(name),
    lambda: tensors[name],
    tensors.alias(name),
  )


def _part(i: int, parts: int) -> Callable[[np.ndarray], np.ndarray]:
  return lambda x: x[i * len(x) // parts : (i + 1) * len(x) // parts]


def _joined(parts: list[Leaf]) -> Leaf:
  rows = sum(part.shape[0] for part in parts)
  return Leaf(
    (rows, *parts[0].shape[1:]),
    parts[0].dtype,
    lambda: np.concatenate([part.read() for part in parts]),
  )


def some(which: Iterable[str], limit: int = 3) -> str:
  """The first few of many names, in a sentence."""
  which = list(which)
  more = f", ... and {len(which) - limit} more" if len(which) > limit else ""
  return ", ".join(which[:limit]) + more
