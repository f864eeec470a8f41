"""Measures conversion of full-size checkpoints: speed, memory and exactness.

  python tools/bench/conversion.py KEYS.json DIR [--case pretrain_large ...]

KEYS.json has the names and shapes of the original's checkpoints
(`{case: {"shapes": {name: shape}, "shared_groups": [[name, ...], ...]}}`). For
each case a checkpoint of random weights with exactly those names and shapes is
written to DIR, converted to the native layout and back to the original's, and,
if transformers has such a model, to Hugging Face's layout and back. Prints a
line per conversion, and fails if any bit changes.
"""

import argparse
import hashlib
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np

from blip_jax.convert import reader, tensor_files, write
from blip_jax.runtime import command, files

TOOLS = pathlib.Path(__file__).resolve().parent.parent
CONVERT = TOOLS / "convert_checkpoint.py"


def write_original(case: dict, path: pathlib.Path) -> None:
  """Writes random weights under all names of a case, tied as it says."""
  ties = {
    name: group[0] for group in case["shared_groups"] for name in group[1:]
  }
  rng = np.random.default_rng(0)

  def make(name, shape):
    if name.endswith("position_ids"):
      return np.arange(shape[-1]).reshape(shape)
    if name == "idx_queue":
      return np.full(shape, -100)
    if name in ("queue_ptr", "ptr_queue"):
      return np.zeros(shape, np.int64)
    return rng.standard_normal(shape, np.float32) * np.float32(0.02)

  tensors = {
    name: lambda name=name, shape=shape: make(name, shape)
    for name, shape in case["shapes"].items()
    if name not in ties
  }
  tensor_files.save_torch(path, tensors, ties)


def convert(source: pathlib.Path, target: pathlib.Path, *flags: str) -> None:
  """Runs the command line, and prints its peak memory and its speed.

  Speed is measured from the first byte read to the last file renamed, and
  again with start-up and imports.
  """
  # In its own process, which gives its own peak memory.
  begin = time.monotonic()
  command = [sys.executable, "-c", _MEASURED, CONVERT, source, target, *flags]
  result = subprocess.run(
    [str(part) for part in command], capture_output=True, text=True
  )
  seconds = time.monotonic() - begin
  if result.returncode:
    raise SystemExit(f"{source} -> {target}: {result.stderr[-2000:]}")
  megabytes = _size(source) / 1e6
  running, peak = map(float, result.stdout.splitlines()[-1].split())
  print(
    f"  {' '.join(flags) or 'orbax':<20} {megabytes:6.0f} MB "
    f"{running:5.1f} s {megabytes / running:5.0f} MB/s; with start-up "
    f"{seconds:5.1f} s {megabytes / seconds:5.0f} MB/s; peak "
    f"{peak:6.0f} MB = {peak / megabytes:.2f} x the file",
    flush=True,
  )


_MEASURED = """
import resource, runpy, sys, time
sys.argv = sys.argv[1:]
# Start-up of Python and JAX does not depend on the file.
import blip_jax.convert.write
begin = time.monotonic()
try:
  runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
  if end.code:
    raise
running = time.monotonic() - begin
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
print(running, peak)
"""


def digests(path: pathlib.Path) -> dict[str, str]:
  tensors = reader.read(path)
  return {
    name: hashlib.sha256(
      f"{tensors.dtype(name)} {tensors.shape(name)}".encode()
      + np.ascontiguousarray(tensors[name]).tobytes()
    ).hexdigest()
    for name in tensors
  }


def _size(path: pathlib.Path) -> int:
  if not files.is_folder(path):
    return files.size(path)
  return sum(
    files.size(pathlib.Path(folder) / name)
    for folder, _, names in files.walk(path)
    for name in names
  )


def _require_equal(
  case: str, digests: dict[str, str], expected: dict[str, str]
) -> None:
  different = sorted(
    name
    for name in digests.keys() | expected.keys()
    if digests.get(name) != expected.get(name)
  )
  if different:
    raise SystemExit(f"{case}: {len(different)} arrays differ: {different[:5]}")


def measure(name: str, case: dict, folder: pathlib.Path) -> None:
  original = folder / f"{name}.pth"
  native, back = folder / name, folder / f"{name}.back"
  write_original(case, original)
  convert(original, native)
  convert(native, back, "--layout", "original")
  _require_equal(name, digests(back), digests(original))
  files.remove_folder(back)
  files.remove(original)
  family, _, size = name.partition("_")
  family = {"decoder": "caption"}.get(family, family)
  if family in write.HF_CLASSES and (family, size) != ("vqa", "large"):
    hf, hf_native = folder / f"{name}.hf", folder / f"{name}.hf_native"
    convert(native, hf, "--layout", "hf")
    convert(hf, hf_native)
    through_hf = folder / f"{name}.through_hf"
    convert(hf_native, through_hf, "--layout", "original")
    direct = folder / f"{name}.direct"
    convert(native, direct, "--layout", "original")
    _require_equal(f"{name} through hf", digests(through_hf), digests(direct))
    for path in (hf, hf_native, through_hf, direct):
      files.remove_folder(path)
  files.remove_folder(native)


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("keys", type=pathlib.Path)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--case", nargs="*", help="default: all")
  args = parser.parse_args(argv)
  cases = files.read_json(args.keys)
  files.make_folder(args.folder)
  for name in args.case or cases:
    print(f"{name}: {len(cases[name]['shapes'])} names", flush=True)
    measure(name, cases[name], args.folder)
  return 0


if __name__ == "__main__":
  sys.exit(main())
