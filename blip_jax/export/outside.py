"""Runs an exported program as another machine does: from its file alone.

  python -m blip_jax.export.outside FORMAT FILE FOLDER

reads the inputs, FOLDER/inputs.npz, and writes the outputs, outputs.npz.
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from blip_jax.runtime import files


def _stablehlo(
  path: pathlib.Path, inputs: Sequence[np.ndarray]
) -> Sequence[np.ndarray]:
  from jax import export

  exported = export.deserialize(bytearray(files.read_bytes(path)))
  return [np.asarray(x) for x in exported.call(*inputs)]


def _onnx(
  path: pathlib.Path, inputs: Sequence[np.ndarray]
) -> Sequence[np.ndarray]:
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3  # it warns of each constant that is not used
  session = onnxruntime.InferenceSession(
    str(path), options, providers=["CPUExecutionProvider"]
  )
  names = [x.name for x in session.get_inputs()]
  outputs = session.run(None, dict(zip(names, inputs, strict=True)))
  return [np.asarray(x) for x in outputs]


_RUN = {"stablehlo": _stablehlo, "onnx": _onnx}


def main(format: str, path: str, folder: str) -> None:
  with np.load(pathlib.Path(folder, "inputs.npz")) as content:
    inputs = [content[name] for name in content.files]
  outputs = _RUN[format](pathlib.Path(path), inputs)
  np.savez(pathlib.Path(folder, "outputs.npz"), *outputs)


if __name__ == "__main__":
  main(*sys.argv[1:])
