"""Weights of an ONNX model as 8-bit integers; what is computed stays float32.

onnxruntime's own `quantize_dynamic` changes nothing here: the layers and the
beam search are loops, which get their weights as inputs.
"""

from typing import Any

import numpy as np

# Of smaller arrays, such as biases, little would be saved.
_MIN_SIZE = 1024
_MAX = 127


def quantise(model: Any) -> None:
  """Replaces float32 matrices of an ONNX model by int8 ones with scales.

  Each column or each row of a matrix has a scale, whichever loses less.

  Args:
    model: an `onnx.ModelProto` of opset 21 or newer, changed in place.
  """
  from onnx import TensorProto, helper, numpy_helper

  graph, stored, nodes = model.graph, [], []
  for tensor in graph.initializer:
    size = np.prod(tensor.dims)
    is_float = tensor.data_type == TensorProto.FLOAT
    if not is_float or len(tensor.dims) < 2 or size < _MIN_SIZE:
      stored.append(tensor)
      continue
    x, name = numpy_helper.to_array(tensor), tensor.name
    axis, values, scales = _rounded(x)
    for array, kind in ((values, "int8"), (scales, "scales")):
      stored.append(numpy_helper.from_array(array, f"{name}/{kind}"))
    nodes.append(
      helper.make_node(
        "DequantizeLinear",
        [f"{name}/int8", f"{name}/scales"],
        [name],
        axis=axis,
        block_size=x.shape[axis],
      )
    )
  nodes += graph.node
  for field, items in ((graph.initializer, stored), (graph.node, nodes)):
    # A copy: what is deleted is what the list refers to.
    copies = [_copy(item) for item in items]
    del field[:]
    field.extend(copies)


def _rounded(x: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
  """The axis that shares a scale, integers, and scales."""
  found = []
  for axis in (x.ndim - 2, x.ndim - 1):
    scales = np.abs(x).max(axis=axis, keepdims=True) / _MAX
    scales = np.where(scales == 0, 1, scales).astype(np.float32)
    values = np.rint(x / scales).astype(np.int8)
    lost = np.square(values * scales - x).sum(dtype=np.float64)
    found.append((lost, axis, values, scales))
  _, axis, values, scales = min(found, key=lambda each: each[0])
  return axis, values, scales


def _copy(item: Any) -> Any:
  copy = type(item)()
  copy.CopyFrom(item)
  return copy
