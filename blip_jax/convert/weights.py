"""Converts parameters between external and native checkpoints, lazily.

Every name on both sides is matched by the table of `names.py`, left out by a
named rule, or an error. Arrays are read only when they are used.
"""

import dataclasses
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from blip_jax.convert import names, reader
from blip_jax.models.nlvr import FIRST_MERGING_LAYER

# Rules, as the report names them.
POSITION_IDS = "position ids: only 0, 1, 2, ..."
AVERAGED = "the number of averaged models"
UNWRAPPED = "wrapper {!r} stripped from names"
ON_REQUEST = "left out on request (--drop)"
TIED = "tied: the same tensor under another name"
LM_MATRIX_WINS = (
  "the LM matrix differs from the word embeddings, with which it should be "
  "tied: the LM matrix is used, as in the original, which loads it last"
)


@dataclasses.dataclass(frozen=True)
class Leaf:
  """An array that is not read yet.

  Attributes:
    shape: of the array.
    dtype: of the array.
    read: reads the array.
    memory: equal for leaves with the same memory and the same changes; None if
      unknown.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]
  memory: Hashable = None

  @classmethod
  def from_array(cls, array: Any) -> "Leaf":
    return cls(tuple(array.shape), np.dtype(array.dtype), lambda: array)

  def is_same(self, other: "Leaf") -> bool:
    """Whether both hold the same values; reads them only if necessary."""
    if self.memory is not None and self.memory == other.memory:
      return True
    return np.array_equal(self.read(), other.read())

  def map(self, change: Callable[[np.ndarray], np.ndarray]) -> "Leaf":
    """Applies a change that moves or casts elements, when the leaf is read."""
    # Shape and dtype come from an array of one element with strides of zero,
    # which costs nothing.
    like = change(np.broadcast_to(np.zeros((), self.dtype), self.shape))
    memory = self.memory and (self.memory, change)
    return Leaf(like.shape, like.dtype, lambda: change(self.read()), memory)

  def layer(self, i: int) -> "Leaf":
    """One layer of a stack."""
    return self.map(_Layer(i))


@dataclasses.dataclass(frozen=True)
class _Layer:
  """Takes one layer out of a stack; equal if it is the same one."""

  i: int

  def __call__(self, x: np.ndarray) -> np.ndarray:
    return x[self.i]


Leaves = dict[str, Leaf]


@dataclasses.dataclass
class Report:
  """What happened to every name.

  Attributes:
    matched: number of native paths with values from the checkpoint.
    dropped: rule -> external names, or native paths, that it left out.
    changed: rule -> native paths, or external names, that it created or
      changed.
    warnings: what a user should know before trusting the results.
  """

  matched: int = 0
  dropped: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  changed: dict[str, list[str]] = dataclasses.field(default_factory=dict)
  warnings: list[str] = dataclasses.field(default_factory=list)

  def drop(self, rule: str, *names: str) -> None:
    self.dropped.setdefault(rule, []).extend(names)

  def change(self, rule: str, *paths: str) -> None:
    self.changed.setdefault(rule, []).extend(paths)

  def __str__(self) -> str:
    lines = [f"matched: {self.matched}"]
    for title, rules in (("dropped", self.dropped), ("changed", self.changed)):
      for rule, paths in rules.items():
        lines.append(f"{title}: {len(paths)} ({rule}): {first_few(paths)}")
    lines += [f"warning: {text}" for text in self.warnings]
    # Missing or unexpected names are errors, so there is no report with any.
    return "\n".join([*lines, "missing: 0", "unexpected: 0"])


def unwrap(
  tensors: reader.Tensors, report: Report, drop: Sequence[str] = ()
) -> reader.Tensors:
  """Strips from names what wrappers such as DistributedDataParallel add.

  Args:
    tensors: of a file.
    report: records each wrapper, with the names that it had.
    drop: regular expressions that match complete names of the file to leave
      out; needed if the file has the same model in two wrappers.

  Raises:
    ValueError: two names of the file become one.
  """
  bare: dict[str, str] = {}
  for name in tensors:
    wrapper, rest = names.unwrap(name)
    if wrapper and _is_dropped(name, drop):
      report.drop(ON_REQUEST, name)
      continue
    if rest in bare:
      raise ValueError(
        f"{bare[rest]} and {name} are both {rest} of a wrapped model; leave "
        "one of the two out with --drop (drop=), for example "
        f"{re.escape(names.unwrap(name)[0] or name)}.*"
      )
    if wrapper:
      report.change(UNWRAPPED.format(wrapper), rest)
    bare[rest] = name
  return tensors.renamed(bare)


def _is_dropped(name: str, drop: Sequence[str]) -> bool:
  return any(re.fullmatch(pattern, name) for pattern in drop)


def from_external(
  tensors: Mapping[str, Any],
  layout: str,
  report: Report,
  drop: Sequence[str] = (),
) -> Leaves:
  """Converts external names and arrays to native leaves.

  Args:
    tensors: names and arrays; the arrays of a `reader.Tensors` are not read.
    layout: one of `names.LAYOUTS`.
    report: records what happened to every name.
    drop: regular expressions that match complete names to leave out.

  Raises:
    ValueError: lists the names that the table does not know; or an array does
      not have the shape that its rule needs.
  """
  leaves: Leaves = {}
  layers: dict[str, dict[int, Leaf]] = {}
  unknown = []
  for name in tensors:
    if _is_dropped(name, drop):
      report.drop(ON_REQUEST, name)
      continue
    match = names.match_external(name, layout)
    if match is None:
      if names.POSITION_IDS.fullmatch(name):
        report.drop(POSITION_IDS, name)
      elif names.AVERAGED.fullmatch(name):
        report.drop(AVERAGED, name)
      elif name not in names.TIED or names.TIED[name] not in tensors:
        unknown.append(name)
      continue
    rule, index = match
    external, parts = _leaf(tensors, name), len(rule.native)
    if parts > 1 and external.shape[0] % parts:
      raise ValueError(
        f"{name}: shape {list(external.shape)} does not split into {parts} "
        "equal parts along its first axis"
      )
    for i, path in enumerate(rule.native):
      leaf = external if parts == 1 else external.map(_part(i, parts))
      leaf = leaf.map(rule.to_native)
      if index is None:
        leaves[path] = leaf
      else:
        layers.setdefault(path, {})[index] = leaf
  if unknown:
    raise ValueError(
      f"{len(unknown)} names that no BLIP model has: {first_few(unknown, 20)}. "
      "Is this another architecture, or a wrapper that prefixes its names? To "
      "leave names out, list them with --drop (drop=)"
    )
  leaves |= _stacks(layers)
  for name, target in names.TIED.items():
    if name in tensors and name not in report.dropped.get(ON_REQUEST, ()):
      _resolve_tied(tensors, name, target, layout, leaves, report)
  return leaves


def to_external(leaves: Leaves, layout: str) -> Leaves:
  """Converts native leaves to external ones, by external name.

  Args:
    leaves: native leaves, by path.
    layout: one of `names.LAYOUTS`.

  Raises:
    ValueError: lists the paths that the layout has no name for.
  """
  external, unknown = {}, []
  for path in leaves:
    merging = path.startswith(_MERGING_LAYERS)
    base = path.replace(_MERGING_LAYERS, _LAYERS, 1)
    rule = names.match_native(base, layout)
    if rule is None:
      unknown.append(path)
    elif base == rule.native[0]:
      native = map(_merging, rule.native) if merging else rule.native
      whole = [leaves[name] for name in native]
      if not rule.has_layers:
        external[rule.external] = _joined(whole, rule)
        continue
      # Neighbours, so that each stack is read once.
      for i in range(whole[0].shape[0]):
        number = i + FIRST_MERGING_LAYER if merging else i
        name = rule.external.replace("{i}", str(number))
        external[name] = _joined([leaf.layer(i) for leaf in whole], rule)
  if unknown:
    raise ValueError(
      f"the layout {layout!r} has no name for {first_few(unknown, 20)}"
    )
  return external


def _resolve_tied(
  tensors: Mapping[str, Any],
  name: str,
  target: str,
  layout: str,
  leaves: Leaves,
  report: Report,
) -> None:
  """Decides between two names of what should be the same tensor."""
  leaf, other = _leaf(tensors, name), _leaf(tensors, target)
  if leaf.shape != other.shape:
    raise ValueError(
      f"{name} {list(leaf.shape)} should be the same tensor as {target} "
      f"{list(other.shape)}; their shapes differ"
    )
  if leaf.is_same(other):
    report.drop(TIED, name)
    return
  match = names.match_external(target, layout)
  assert match is not None, target
  (path,) = match[0].native
  leaves[path] = leaf
  report.change(LM_MATRIX_WINS, path)
  report.warnings.append(f"{name}: {LM_MATRIX_WINS}")


def _leaf(tensors: Mapping[str, Any], name: str) -> Leaf:
  if not isinstance(tensors, reader.Tensors):
    return Leaf.from_array(tensors[name])
  return Leaf(
    tensors.shape(name),
    tensors.dtype(name),
    lambda: tensors[name],
    tensors.alias(name),
  )


def _part(i: int, parts: int) -> Callable[[np.ndarray], np.ndarray]:
  return lambda x: x[i * len(x) // parts : (i + 1) * len(x) // parts]


def _joined(native: Sequence[Leaf], rule: names.Rule) -> Leaf:
  """The external array of (a layer of) the native arrays of a rule."""
  parts = [leaf.map(rule.to_external) for leaf in native]
  if len(parts) == 1:
    return parts[0]
  rows = sum(part.shape[0] for part in parts)
  return Leaf(
    (rows, *parts[0].shape[1:]),
    parts[0].dtype,
    lambda: np.concatenate([part.read() for part in parts]),
  )


def _stacks(layers: dict[str, dict[int, Leaf]]) -> Leaves:
  """Stacks the layers of each path.

  Raises:
    ValueError: a layer is missing, or has another shape than the others.
  """
  leaves = {}
  merges = any("/crossattention/merge/" in path for path in layers)
  for path, by_index in layers.items():
    first = 0
    if merges and path.startswith(_LAYERS):
      lower = {i: x for i, x in by_index.items() if i < FIRST_MERGING_LAYER}
      upper = {i: x for i, x in by_index.items() if i >= FIRST_MERGING_LAYER}
      if lower:
        leaves[path] = _stacked(path, lower, 0)
      path, by_index, first = _merging(path), upper, FIRST_MERGING_LAYER
    if by_index:
      leaves[path] = _stacked(path, by_index, first)
  return leaves


def _stacked(path: str, by_index: dict[int, Leaf], first: int) -> Leaf:
  size = max(by_index) + 1 - first
  missing = [i for i in range(first, first + size) if i not in by_index]
  if missing:
    raise ValueError(
      f"{path}: expected layers {first} to {first + size - 1}, found none of "
      f"number {first_few(map(str, missing))}"
    )
  parts = [by_index[i] for i in range(first, first + size)]
  for i, part in enumerate(parts):
    if part.shape != parts[0].shape:
      raise ValueError(
        f"{path}: layer {first + i} has shape {part.shape}, and layer {first} "
        f"{parts[0].shape}"
      )
  memory = tuple(part.memory for part in parts)
  return Leaf(
    (size, *parts[0].shape),
    parts[0].dtype,
    lambda: np.stack([part.read() for part in parts]),
    None if None in memory else memory,
  )


# The layers of NLVR's text tower from `FIRST_MERGING_LAYER` on are a stack of
# their own.
_LAYER = re.compile(r"(.*/)(block|layer)_(\d+)(/.*)")
_LAYERS, _MERGING_LAYERS = (
  f"params/text_encoder/{name}/" for name in ("layers", "merging_layers")
)


def _merging(path: str) -> str:
  return path.replace(_LAYERS, _MERGING_LAYERS, 1)


def stack_layers(leaves: Leaves) -> Leaves:
  """Stacks layers that have a name each.

  Those of checkpoints from before 0.1.0: `text_encoder/layer_3/...`.
  """
  others: Leaves = {}
  layers: dict[str, dict[int, Leaf]] = {}
  for path, leaf in leaves.items():
    if match := _LAYER.fullmatch(path):
      before, name, index, after = match.groups()
      layers.setdefault(f"{before}{name}s{after}", {})[int(index)] = leaf
    else:
      others[path] = leaf
  return others | _stacks(layers)


def split_merging(leaves: Leaves) -> Leaves:
  """Splits the text tower's layers into those of NLVR's two stacks."""
  split = {}
  for path, leaf in leaves.items():
    if not path.startswith(_LAYERS):
      split[path] = leaf
      continue
    split[path] = leaf.map(_below)
    if leaf.shape[0] > FIRST_MERGING_LAYER:
      split[_merging(path)] = leaf.map(_above)
  return split


def _below(x: np.ndarray) -> np.ndarray:
  return x[:FIRST_MERGING_LAYER]


def _above(x: np.ndarray) -> np.ndarray:
  return x[FIRST_MERGING_LAYER:]


def first_few(names: Iterable[str], limit: int = 3) -> str:
  """The first names as text, and how many more there are."""
  names = list(names)
  more = f", ... and {len(names) - limit} more" if len(names) > limit else ""
  return ", ".join(names[:limit]) + more
