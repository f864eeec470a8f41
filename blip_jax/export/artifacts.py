"""A folder of exported programs, each with a sidecar, and each run once in
another process, without the model.
"""

import datetime
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import blip_jax
from blip_jax.convert import companions
from blip_jax.data import scenes, transforms
from blip_jax.export import formats, outside
from blip_jax.export.programs import Program
from blip_jax.inference.model import Model
from blip_jax.runtime import files

# JAX promises that its releases of half a year read what is exported today.
GUARANTEE = datetime.timedelta(days=180)
# Numbers that outputs may differ by, relative to the largest one; ids may not.
LIMIT = 1e-4
# What is done before: pixels are RGB from 0 to 255, and normalised inside.
_OUTSIDE = ("do_convert_rgb", "do_resize", "size", "resample")
# Batches that are compared, if one file serves all sizes.
_BATCHES = (1, 3)
# Batches of drawings on which the cost of int8 is measured.
_DRAWINGS = 16


def write(
  model: Model,
  programs: Sequence[Program],
  folder: pathlib.Path,
  format: str,
  batch_size: int,
  weights: str = "float32",
) -> dict[str, dict[str, float]]:
  """Writes programs, sidecars and the vocabulary, and compares the outputs.

  Args:
    model: whose programs these are.
    programs: from `programs_of`.
    folder: a new one; it appears complete or not at all.
    format: a name of `formats.FORMATS`.
    batch_size: of files that serve batches of one size.
    weights: "int8" rounds them, which has a cost: what is returned.

  Returns:
    For each program and output, the largest difference from the model's own
    program, relative to the largest value; for ids the share that differs.

  Raises:
    ValueError: the folder exists, or outputs differ by more than `LIMIT`,
      though weights are float32.
  """
  chosen = formats.get(format, weights)
  refuse_existing(folder)
  temporary = pathlib.Path(files.temporary_path(folder))
  try:
    files.make_folder(temporary)
    if model.tokenizer is not None:
      model.tokenizer.save(temporary)
    found = {}
    for program in programs:
      path = temporary / f"{program.name}.{chosen.ending}"
      chosen.write(program, batch_size, weights, path)
      sizes = _BATCHES if chosen.any_batch else (batch_size,)
      if weights == "float32":
        inputs = [_random(program, size) for size in sizes]
      else:
        inputs = [_drawings(program, batch_size)]
      found[program.name] = _differences(program, path, format, inputs)
      if weights == "float32":
        _refuse(program, found[program.name])
      said = _sidecar(model, program, format, chosen, batch_size)
      said["weights"] = weights
      said["differences"] = found[program.name]
      files.write_json(temporary / f"{program.name}.json", said)
    files.rename(temporary, folder)
  finally:
    files.remove_folder(temporary)
  return found


def refuse_existing(folder: pathlib.Path) -> None:
  """Raises `ValueError` if the folder, or a file of this name, exists."""
  if files.exists(folder):
    raise ValueError(f"{folder} exists already; give another path, or move it")


def _sidecar(
  model: Model,
  program: Program,
  format: str,
  chosen: formats.Format,
  batch_size: int,
) -> dict[str, Any]:
  batch = "batch" if chosen.any_batch else batch_size
  said = {
    "program": program.name,
    "family": model.card.family,
    "source": model.card.source,
    "inputs": {
      name: {"shape": [batch, *shape], "dtype": dtype}
      for name, (shape, dtype) in program.inputs.items()
    },
    "outputs": list(program.outputs),
    "preprocessing": {
      name: value
      for name, value in companions.preprocessing(model.card).items()
      if name in _OUTSIDE
    },
    **program.settings,
    "versions": {"blip_jax": blip_jax.__version__, "jax": jax.__version__},
  }
  if format == "stablehlo":
    until = datetime.date.today() + GUARANTEE
    said["platforms"] = list(formats.PLATFORMS)
    said["readable_by_jax_until"] = until.isoformat()
  return said


def _random(program: Program, size: int) -> list[np.ndarray]:
  return [x[None] for x in program.example(size)]


def _drawings(program: Program, size: int) -> list[np.ndarray]:
  """Batches of images in which there is something to see."""
  numbers = range(_DRAWINGS)
  batches = [program.example(size, seed) for seed in numbers]
  inputs = [np.stack(arrays) for arrays in zip(*batches, strict=True)]
  height, width = inputs[0].shape[2:4]
  resize = transforms.EvalImage((height, width))
  source = scenes.Scenes("val", max(height, width), num=_DRAWINGS * size)
  images = [resize(source[i]["image"]) for i in range(_DRAWINGS * size)]
  inputs[0] = np.stack(images).reshape(inputs[0].shape)
  return inputs


def _differences(
  program: Program,
  path: pathlib.Path,
  format: str,
  runs: Sequence[Sequence[np.ndarray]],
) -> dict[str, float]:
  """The largest differences from the model, in fresh processes.

  Args:
    program: the model's.
    path: of its file.
    format: of the file.
    runs: for each process its inputs, arrays [n, batch, ...].
  """
  function, found = jax.jit(program.function), {}
  for inputs in runs:
    batches = [function(*batch) for batch in zip(*inputs, strict=True)]
    expected = [np.stack(x) for x in zip(*batches, strict=True)]
    outputs = _run_elsewhere(path, format, inputs)
    for name, x, y in zip(program.outputs, expected, outputs, strict=True):
      found[name] = max(found.get(name, 0.0), _difference(x, y))
  return found


def _run_elsewhere(
  path: pathlib.Path, format: str, inputs: Sequence[np.ndarray]
) -> list[np.ndarray]:
  with files.temporary_folder() as folder:
    np.savez(folder / "inputs.npz", *inputs)
    words = [
      sys.executable,
      "-m",
      outside.__name__,
      format,
      str(path),
      str(folder),
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
      last = done.stderr.strip().splitlines()[-1:]
      raise ValueError(f"{path.name} does not run: {' '.join(last)}")
    with np.load(folder / "outputs.npz") as outputs:
      return [outputs[name] for name in outputs.files]


def _difference(x: np.ndarray, y: np.ndarray) -> float:
  if x.shape != y.shape:
    return float("inf")
  if np.issubdtype(x.dtype, np.integer):
    return float(np.mean(x != y))
  return float(np.max(np.abs(x - y)) / max(float(np.max(np.abs(x))), 1e-30))


def _refuse(program: Program, found: dict[str, float]) -> None:
  # The negation also refuses NaN.
  bad = {name: x for name, x in found.items() if not x <= LIMIT}
  if bad:
    raise ValueError(
      f"{program.name}: outputs differ from the model's, relative to the "
      f"largest value, by {bad}; expected at most {LIMIT}"
    )
