"""Interprets the pickles of `torch.save` without executing them.

Only the few opcodes that describe a state dict are supported. All they can
build are containers, numbers, strings and descriptions of tensors. For
untrusted files a `pickle.Unpickler` with a strict `find_class` is not enough:
a deeply nested tuple as a key crashes it, and one large memo index takes all
memory.
"""

import dataclasses
import math
import pickletools
import reprlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

_MAX_DIMS = 64  # as NumPy
_MAX_ELEMENTS = 1 << 48  # what fits an address, and int64 as a byte offset

# Shortens names in messages: forged names may be as long as the file.
BRIEF = reprlib.Repr()
BRIEF.maxstring = 120

RESAVE = 'torch.save({"model": model.state_dict()}, path)'


class Refusal(ValueError):
  """Says what is wrong and what helps; the reader adds the file's name."""


@runtime_checkable
class Storage(Protocol):
  """Bytes of a file, of which tensors are views."""

  @property
  def size(self) -> int:
    """In bytes."""
    ...

  def buffer(self) -> memoryview | bytes:
    """Reads the bytes."""
    ...


@dataclasses.dataclass(frozen=True)
class Elements:
  """A storage with the dtype and number of elements that a pickle gives it."""

  storage: Storage
  dtype: np.dtype
  count: int


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A view of a storage; offset and strides are in bytes."""

  storage: Storage
  dtype: np.dtype
  shape: tuple[int, ...]
  strides: tuple[int, ...]
  offset: int


class _OrderedDict(dict):
  """The only container that may be given a state (by BUILD)."""


def _ordered_dict():
  return _OrderedDict()


def _size(values):
  # Copying a list here would let a small file take a lot of memory.
  if type(values) is not tuple:
    raise ValueError("torch.Size of something other than a tuple")
  return values


def _rebuild_tensor(
  elements, offset, shape, strides, requires_grad, hooks, metadata=None
):
  del requires_grad, hooks, metadata
  return tensor(elements, offset, shape, strides)


def _rebuild_parameter(tensor, requires_grad, hooks):
  del requires_grad, hooks
  return tensor


# All globals that a pickle may name, and so all functions that it may call
# (dtypes are not callable). A forged file may pass any arguments to them.
_GLOBALS = {
  "collections OrderedDict": _ordered_dict,
  "torch Size": _size,
  "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
  "torch._utils _rebuild_parameter": _rebuild_parameter,
  "torch DoubleStorage": np.dtype(np.float64),
  "torch FloatStorage": np.dtype(np.float32),
  "torch HalfStorage": np.dtype(np.float16),
  "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "torch LongStorage": np.dtype(np.int64),
  "torch IntStorage": np.dtype(np.int32),
  "torch ShortStorage": np.dtype(np.int16),
  "torch CharStorage": np.dtype(np.int8),
  "torch ByteStorage": np.dtype(np.uint8),
  "torch BoolStorage": np.dtype(np.bool_),
  "torch.storage UntypedStorage": np.dtype(np.uint8),
}


_CONSTANTS = {
  "NONE": lambda: None,
  "NEWTRUE": lambda: True,
  "NEWFALSE": lambda: False,
  "EMPTY_TUPLE": tuple,
  "EMPTY_LIST": list,
  "EMPTY_DICT": dict,
}


def interpret(program: bytes, storages: Mapping[str, Storage]) -> Any:
  """Builds the value that a pickle of protocol 2 describes.

  Only functions of `_GLOBALS` are called. Time and memory are bounded by the
  length of the program: no value is copied, traversed or, except for scalars,
  hashed.

  Args:
    program: the pickle.
    storages: of the file, by the keys that the pickle uses.

  Raises:
    Refusal: the pickle needs an opcode or a global that weights do not.
    Exception: of any type, if the pickle is damaged.
  """
  stack, below_marks, memo = [], [], {}
  for opcode, arg, _ in pickletools.genops(program):
    match opcode.name:
      case "PROTO":
        pass
      case name if name in _CONSTANTS:
        stack.append(_CONSTANTS[name]())
      case "BININT" | "BININT1" | "BININT2" | "LONG1":
        assert isinstance(arg, int)
        if abs(arg) >> 64:
          raise ValueError("an integer of more than 64 bits")
        stack.append(arg)
      case "BINUNICODE" | "BINFLOAT":
        stack.append(arg)
      case "BINPUT" | "LONG_BINPUT":
        memo[arg] = stack[-1]
      case "BINGET" | "LONG_BINGET":
        stack.append(memo[arg])
      case "MARK":
        below_marks.append(stack)
        stack = []
      case "TUPLE1" | "TUPLE2" | "TUPLE3":
        count = int(opcode.name[-1])
        stack.append(tuple(reversed([stack.pop() for _ in range(count)])))
      case "TUPLE":
        items, stack = stack, below_marks.pop()
        stack.append(tuple(items))
      case "APPEND":
        item = stack.pop()
        stack[-1].append(item)
      case "APPENDS":
        items, stack = stack, below_marks.pop()
        stack[-1].extend(items)  # only a list can be
      case "SETITEM":
        value, key = stack.pop(), stack.pop()
        _update(stack[-1], [key, value])
      case "SETITEMS":
        items, stack = stack, below_marks.pop()
        _update(stack[-1], items)
      case "GLOBAL":
        stack.append(_global(arg))
      case "REDUCE":
        args, function = stack.pop(), stack.pop()
        if not callable(function) or type(args) is not tuple:
          raise ValueError(f"a call of a {type(function).__name__}")
        stack.append(function(*args))
      case "BUILD":
        # `state_dict` attaches module versions to its OrderedDict; ignored.
        del stack[-1]
        if not isinstance(stack[-1], _OrderedDict):
          raise ValueError(f"a state for a {type(stack[-1]).__name__}")
      case "BINPERSID":
        stack.append(_elements(stack.pop(), storages))
      case "STOP":
        return stack.pop()
      case _:
        raise Refusal(
          f"its pickle has the opcode {opcode.name}, which torch.save does not "
          f"write; nothing was executed. If you trust it, load it and {RESAVE}"
        )


def _global(arg):
  if arg not in _GLOBALS:
    name = arg.replace(" ", ".", 1)
    raise Refusal(
      f"its pickle asks for {BRIEF.repr(name)}, which weights do not need; "
      "nothing was executed. If you trust the file, load it with torch and "
      f"save the weights alone: {RESAVE}"
    )
  return _GLOBALS[arg]


def _update(target, items):
  if not isinstance(target, dict):
    raise ValueError(f"items for a {type(target).__name__}")
  for key, value in zip(items[::2], items[1::2], strict=True):
    # Hashing a deeply nested tuple would overflow the stack.
    if not isinstance(key, str | int | float | None):
      raise ValueError(f"a {type(key).__name__} as a key")
    target[key] = value


def _elements(reference, storages):
  kind, dtype, key, _, count = reference
  if not (
    kind == "storage"
    and isinstance(dtype, np.dtype)
    and isinstance(key, str)
    and type(count) is int
  ):
    raise ValueError("a persistent id that is not a storage")
  size = storages[key].size if key in storages else 0
  if count * dtype.itemsize > size:
    raise ValueError(
      f"expected {count} elements of {dtype} in data/{key[:20]}, found {size} "
      "bytes"
    )
  return Elements(storages[key], dtype, count)


def tensor(elements, offset, shape, strides):
  """Describes a view of a storage, after checking that it fits.

  Args:
    elements: the storage; this and all else may be forged.
    offset: in elements.
    shape: of the view.
    strides: in elements.

  Raises:
    ValueError: the view does not fit its storage, or has no valid shape.
  """
  if not isinstance(elements, Elements) or not (
    type(shape) is type(strides) is tuple
    and len(shape) == len(strides) <= _MAX_DIMS
    and all(
      type(number) is int and 0 <= number <= _MAX_ELEMENTS
      for number in (offset, *shape, *strides)
    )
    and math.prod(length or 1 for length in shape) <= _MAX_ELEMENTS
  ):
    raise ValueError("a tensor without a proper storage, shape or strides")
  size = math.prod(shape)
  steps = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
  end = offset + steps + 1 if size else offset
  # With strides of zero a small storage would give a large tensor.
  if max(end, size) > elements.count:
    raise ValueError(
      f"a tensor of shape {shape}, strides {strides} and offset {offset} does "
      f"not fit its storage of {elements.count} elements"
    )
  itemsize = elements.dtype.itemsize
  return Tensor(
    elements.storage,
    elements.dtype,
    shape,
    tuple(stride * itemsize for stride in strides),
    offset * itemsize,
  )
