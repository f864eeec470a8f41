"""Runs an exported program as another machine does: from its file alone.

  python -m blip_jax.export.outside FORMAT FILE FOLDER

reads the inputs of n batches, FOLDER/inputs.npz, each array [n, batch, ...],
and writes the outputs, outputs.npz, in the same way.
"""

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from blip_jax.runtime import files

# Outputs may be arrays of any library.
Run = Callable[[Sequence[np.ndarray]], Sequence[Any]]


def _stablehlo(path: pathlib.Path) -> Run:
  from jax import export

  exported = export.deserialize(bytearray(files.read_bytes(path)))
  return lambda inputs: [*exported.call(*inputs)]


def _onnx(path: pathlib.Path) -> Run:
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3  # it warns of each constant that is not used
  session = onnxruntime.InferenceSession(
    str(path), options, providers=["CPUExecutionProvider"]
  )
  names = [x.name for x in session.get_inputs()]
  return lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def _openvino(path: pathlib.Path) -> Run:
  from blip_jax.export import formats

  # By default it rounds to bfloat16, where the processor can.
  options = {"INFERENCE_PRECISION_HINT": "f32"}
  core = formats.openvino().Core()
  compiled = core.compile_model(str(path), "CPU", options)
  # Copies: the next call writes into the same memory.
  return lambda inputs: [x.copy() for x in compiled(inputs).values()]


_LOAD = {"stablehlo": _stablehlo, "onnx": _onnx, "openvino": _openvino}


def main(format: str, path: str, folder: str) -> None:
  with np.load(pathlib.Path(folder, "inputs.npz")) as content:
    inputs = [content[name] for name in content.files]
  run = _LOAD[format](pathlib.Path(path))
  outputs = [run(batch) for batch in zip(*inputs, strict=True)]
  stacked = [np.stack(batches) for batches in zip(*outputs, strict=True)]
  np.savez(pathlib.Path(folder, "outputs.npz"), *stacked)


if __name__ == "__main__":
  main(*sys.argv[1:])
