"""Formats of exported programs: how a program becomes a file.

How it runs from there is in `outside.py`.
"""

import importlib
import importlib.metadata
import logging
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import export

from blip_jax.export import int8
from blip_jax.export.programs import Program
from blip_jax.runtime import files

# Where one artifact of StableHLO runs.
PLATFORMS = ("cpu", "cuda", "tpu")
WEIGHTS = ("float32", "int8")
# The first versions of JAX whose programs need a newer jax2onnx, and which one;
# that for jax 0.12 did not exist yet when 0.17.1 was tried.
_NEEDED = {(0, 12): (0, 18), (0, 11): (0, 15)}


class Format(NamedTuple):
  """A kind of file.

  Attributes:
    packages: that it needs, of the extra of the same name.
    write: (program, batch size, type of the weights, path) -> None.
    ending: of the path.
    any_batch: whether one file serves batches of all sizes.
    weights: types that they may have, of `WEIGHTS`.
  """

  packages: Sequence[str]
  write: Callable[[Program, int, str, pathlib.Path], None]
  ending: str
  any_batch: bool
  weights: Sequence[str]


def get(name: str, weights: str = "float32") -> Format:
  """The format of a name.

  Raises:
    ValueError: there is none, it has no weights of this type, or what it needs
      is not installed, or is too old for this JAX.
  """
  if name not in FORMATS:
    raise ValueError(f"--format: expected one of {[*FORMATS]}, found {name!r}")
  found = FORMATS[name]
  if weights not in found.weights:
    raise ValueError(
      f"--weights: expected one of {[*found.weights]}, of --format {name}, "
      f"found {weights!r}"
    )
  if "jax2onnx" in found.packages:
    check_jax2onnx(name)
  for package in found.packages:
    try:
      _import(package)
    except ImportError as error:
      raise ValueError(
        f"--format {name} needs {package}: pip install -e '.[{name}]'"
      ) from error
  return found


def check_jax2onnx(format: str) -> None:
  """Raises `ValueError` if what is installed cannot read programs of JAX."""
  try:
    found = importlib.metadata.version("jax2onnx")
  except importlib.metadata.PackageNotFoundError:
    return  # which the import tells
  version = tuple(map(int, found.split(".")[:2]))
  if any(jax.__version_info__ >= x and version < y for x, y in _NEEDED.items()):
    raise ValueError(
      f"--format {format}: jax2onnx {found} cannot read programs of jax "
      f"{jax.__version__}; expected jax 0.10, which pip install -e "
      f"'.[{format}]' brings"
    )


def openvino() -> Any:
  """The package, which would report its import to its makers."""
  return _import("openvino")


def _import(package: str) -> Any:
  if package == "jax2onnx":
    # It warns, with a traceback, of each operation of another library that it
    # cannot load, and of all types that it leaves open.
    for name in (package, "onnx_ir"):
      logging.getLogger(name).setLevel(logging.ERROR)
  if package == "openvino":
    # It goes on without, and says nothing to anybody then.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore
  return importlib.import_module(package)


def _write_stablehlo(
  program: Program, _: int, weights: str, path: pathlib.Path
) -> None:
  (batch,) = export.symbolic_shape("batch")
  exported = export.export(jax.jit(program.function), platforms=PLATFORMS)(
    *program.specs(batch)
  )
  files.write_bytes(path, bytes(exported.serialize()))


def _write_onnx(
  program: Program, batch: int, weights: str, path: pathlib.Path
) -> None:
  import jax2onnx
  import onnx

  try:
    model: Any = jax2onnx.to_onnx(
      program.function, program.specs(batch), model_name=program.name
    )
  except NotImplementedError as error:  # which names the operation
    raise ValueError(f"{program.name}: not in ONNX: {error}") from error
  names = [*program.inputs], [*program.outputs]
  _rename(model.graph, *names)
  if weights == "int8":
    int8.quantise(model)
  onnx.checker.check_model(model)
  onnx.save(model, str(path))


def _write_openvino(
  program: Program, batch: int, weights: str, path: pathlib.Path
) -> None:
  """Its weights are in a second file, with the ending .bin."""
  with files.temporary_folder() as folder:
    onnx_path = folder / f"{program.name}.onnx"
    _write_onnx(program, batch, weights, onnx_path)
    try:
      model = openvino().Core().read_model(str(onnx_path))
    except RuntimeError as error:  # which names the operation
      raise ValueError(f"{program.name}: not in OpenVINO: {error}") from error
    openvino().save_model(model, str(path), compress_to_fp16=False)


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
  "stablehlo": Format(
    ["flatbuffers"],
    _write_stablehlo,
    ending="stablehlo",
    any_batch=True,
    weights=["float32"],
  ),
  "onnx": Format(
    ["jax2onnx", "onnxruntime"],
    _write_onnx,
    ending="onnx",
    any_batch=False,
    weights=WEIGHTS,
  ),
  "openvino": Format(
    ["jax2onnx", "openvino"],
    _write_openvino,
    ending="xml",
    any_batch=False,
    weights=WEIGHTS,
  ),
}
