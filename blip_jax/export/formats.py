"""Formats of exported programs: how a program becomes a file.

How it runs from there is in `outside.py`.
"""

import importlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import export

from blip_jax.export.programs import Program
from blip_jax.runtime import files

# Where one artifact of StableHLO runs.
PLATFORMS = ("cpu", "cuda", "tpu")


class Format(NamedTuple):
  """A kind of file.

  Attributes:
    packages: that it needs, of the extra of the same name.
    write: (program, batch size, path) -> None.
    any_batch: whether one file serves batches of all sizes.
  """

  packages: Sequence[str]
  write: Callable[[Program, int, pathlib.Path], None]
  any_batch: bool


def get(name: str) -> Format:
  """The format of a name.

  Raises:
    ValueError: there is none, or what it needs is not installed.
  """
  if name not in FORMATS:
    raise ValueError(f"--format: expected one of {[*FORMATS]}, found {name!r}")
  found = FORMATS[name]
  for package in found.packages:
    try:
      importlib.import_module(package)
    except ImportError as error:
      raise ValueError(
        f"--format {name} needs {package}: pip install -e '.[{name}]'"
      ) from error
  return found


def _write_stablehlo(program: Program, _: int, path: pathlib.Path) -> None:
  (batch,) = export.symbolic_shape("batch")
  exported = export.export(jax.jit(program.function), platforms=PLATFORMS)(
    *program.specs(batch)
  )
  files.write_bytes(path, bytes(exported.serialize()))


def _write_onnx(program: Program, batch: int, path: pathlib.Path) -> None:
  import jax2onnx
  import onnx

  model: Any = jax2onnx.to_onnx(
    program.function, program.specs(batch), model_name=program.name
  )
  names = [*program.inputs], [*program.outputs]
  _rename(model.graph, *names)
  onnx.checker.check_model(model)
  onnx.save(model, str(path))


def _rename(graph: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
  """Gives inputs and outputs of an ONNX graph their names."""
  new = dict(zip([x.name for x in graph.input], inputs, strict=True))
  new |= dict(zip([x.name for x in graph.output], outputs, strict=True))
  for value in (*graph.input, *graph.output):
    value.name = new[value.name]
  for node in graph.node:
    for names in (node.input, node.output):
      for number, name in enumerate(names):
        names[number] = new.get(name, name)


FORMATS = {
  "stablehlo": Format(["flatbuffers"], _write_stablehlo, any_batch=True),
  "onnx": Format(["jax2onnx", "onnxruntime"], _write_onnx, any_batch=False),
}
