"""Measures conversion of full-size checkpoints: speed, memory and losses.

  python tools/bench/conversion.py KEYS.json DIR [--case pretrain_large ...]

KEYS.json has the names and shapes of the original's checkpoints
(`{case: {"shapes": {name: shape}, "shared_groups": [[name, ...], ...]}}`).  For
each case a checkpoint of random weights of exactly those names and shapes is
written to DIR, converted to ours and back to the original's layout, and, where
transformers has such a model, to Hugging Face's and back.  Prints a line per
conversion, and fails if a bit is lost.
"""

import argparse
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np

from blip_jax.convert import reader, tensor_files, write

TOOLS = pathlib.Path(__file__).resolve().parent.parent
CONVERT = TOOLS / "convert_checkpoint.py"


def write_original(case: dict, path: pathlib.Path) -> None:
  """Random weights under all names of a case, tied where the case says so."""
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
  """Runs the command line, and prints its peak memory and its speed: from the
  first byte read to the last file renamed, and with the imports before."""
  # Its own process, so that its peak is its own.
  begin = time.monotonic()
  command = [sys.executable, "-c", _MEASURED, CONVERT, source, target, *flags]
  told = subprocess.run(
    [str(part) for part in command], capture_output=True, text=True
  )
  seconds = time.monotonic() - begin
  if told.returncode:
    raise SystemExit(f"{source} -> {target}: {told.stderr[-2000:]}")
  megabytes = _size(source) / 1e6
  running, peak = map(float, told.stdout.splitlines()[-1].split())
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
# Of starting Python and JAX, whatever the file.
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
  files = path.rglob("*") if path.is_dir() else [path]
  return sum(file.stat().st_size for file in files if file.is_file())


def _require_equal(what: str, found: dict, expected: dict) -> None:
  differ = sorted(
    name
    for name in found.keys() | expected.keys()
    if found.get(name) != expected.get(name)
  )
  if differ:
    raise SystemExit(f"{what}: {len(differ)} arrays differ: {differ[:5]}")


def measure(name: str, case: dict, folder: pathlib.Path) -> None:
  original, ours, back = (folder / f"{name}{s}" for s in (".pth", "", ".back"))
  write_original(case, original)
  convert(original, ours)
  convert(ours, back, "--layout", "original")
  _require_equal(name, digests(back), digests(original))
  shutil.rmtree(back)
  original.unlink()
  family, _, size = name.partition("_")
  family = {"decoder": "caption"}.get(family, family)
  if family in write.HF_CLASSES and (family, size) != ("vqa", "large"):
    theirs, again = folder / f"{name}.hf", folder / f"{name}.again"
    convert(ours, theirs, "--layout", "hf")
    convert(theirs, again)
    final = folder / f"{name}.final"
    convert(again, final, "--layout", "original")
    first = folder / f"{name}.first"
    convert(ours, first, "--layout", "original")
    _require_equal(f"{name} through hf", digests(final), digests(first))
    for path in (theirs, again, final, first):
      shutil.rmtree(path)
  shutil.rmtree(ours)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("keys", type=pathlib.Path)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--case", nargs="*", help="default: all")
  args = parser.parse_args(argv)
  cases = json.loads(args.keys.read_text())
  args.folder.mkdir(parents=True, exist_ok=True)
  for name in args.case or cases:
    print(f"{name}: {len(cases[name]['shapes'])} names", flush=True)
    measure(name, cases[name], args.folder)
  return 0


if __name__ == "__main__":
  sys.exit(main())
