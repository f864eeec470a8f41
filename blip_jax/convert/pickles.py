"""What `torch.save` says in its pickles, understood without executing them.

The few opcodes that describe a state dict are interpreted here, and all they
can build are containers, numbers, strings and descriptions of tensors. A
`pickle.Unpickler` with a strict `find_class` is not enough for files from
anywhere: a deep tuple as a key crashes it, and one large memo index takes all
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

# For names in messages: they may be forged, and as long as the file.
BRIEF = reprlib.Repr()
BRIEF.maxstring = 120

RESAVE = 'torch.save({"model": model.state_dict()}, path)'


class Refusal(ValueError):
  """What is wrong and what to do about it; the file's name is added later."""


@runtime_checkable
class Storage(Protocol):
  """Bytes of a file, of which tensors are views."""

  size: int


@dataclasses.dataclass(frozen=True)
class Elements:
  """A storage that a pickle gave a dtype and a length."""

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
  """Set apart from `dict` because it alone may be given a state."""


def _ordered_dict():
  return _OrderedDict()


def _size(values):
  # Only a tuple is passed on as it is; copies would multiply a small file.
  if type(values) is not tuple:
    raise ValueError("torch.Size of something else than a tuple")
  return values


def _rebuild_tensor(
  elements, offset, shape, strides, requires_grad, hooks, metadata=None
):
  del requires_grad, hooks, metadata
  return tensor(elements, offset, shape, strides)


def _rebuild_parameter(tensor, requires_grad, hooks):
  del requires_grad, hooks
  return tensor


# All that a pickle may name, and so all that it may call (no dtype can be). The
# functions take whatever arguments a forged file gives them.
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
  """Returns what a pickle of protocol 2 describes, calling `_GLOBALS` only.

  Time and memory are bounded by the length of the program: nothing that is
  built is copied, hashed (but for scalars) or walked through.
  """
  stack, below_marks, memo = [], [], {}
  for opcode, arg, _ in pickletools.genops(program):
    match opcode.name:
      case "PROTO":
        pass
      case name if name in _CONSTANTS:
        stack.append(_CONSTANTS[name]())
      case "BININT" | "BININT1" | "BININT2" | "LONG1":
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
        # The versions of modules, which `state_dict` hangs on its OrderedDict.
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
    # To hash a deep tuple would overflow the stack.
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
    raise ValueError("a persistent id that is no storage")
  size = storages[key].size if key in storages else 0
  if count * dtype.itemsize > size:
    raise ValueError(
      f"expected {count} elements of {dtype} in data/{key[:20]}, found {size} "
      "bytes"
    )
  return Elements(storages[key], dtype, count)


def tensor(elements, offset, shape, strides):
  """A view of elements, in which offset and strides count elements."""
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
  # Strides of zero make a large tensor of a small storage.
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
