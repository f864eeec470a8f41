"""Measures training, inference and reading; compares them with other programs.

  python tools/bench.py                          everything, base
  python tools/bench.py caption filter --size base large --compare hf \
    --out bench.json
  python tools/bench.py rerank --size tiny --compare plain      a quick try
  python tools/bench.py --out bench.json --table --plot roofline.png

An installed package has it as `python -m blip_jax.tools.bench`. Kinds are
pretrain, encode, caption, samples, filter, rerank, answer, rank, loader,
capfilt, and all.
Weights and images are random, and no vocabulary is needed.

`--compare hf` compares with transformers, as it is and with PyTorch's fused
attention, `--compare plain` with our own programs without what makes them fast.
Peers have the same weights, run in the same process, in turns, each at its best
batch size; there is a ratio only if the outputs are the same. What is not
installed, or fails, costs its row or column only.

`--dtype float8` measures products of 8-bit floats, and compares them with
bfloat16: what inference has of them, on a GPU that has them.

Each row is added to `--out` as soon as it is known; the file may be there, and
rows that are measured again are replaced. With `--table` or `--plot` and no
kind, nothing is measured: the rows of `--out` are printed as Markdown, or drawn
(extra [bench]).
"""

import argparse
import os
import sys
from collections.abc import Collection, Sequence

# JAX leaves room on a GPU for PyTorch. OpenMP, of PyTorch, does not spin in
# wait for a core that another process has: on a busy machine that took 20 times
# as long. Both are read when the libraries are loaded.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jax

from blip_jax.models import config as model_config
from blip_jax.models import float8
from blip_jax.runtime import command, devices

from . import contest, kinds, results, roofline

DEVICES = ("cpu", "gpu", "tpu")
DTYPES = ("float32", "bfloat16", float8.NAME)


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("kinds", nargs="*", metavar="KIND")
  parser.add_argument("--size", nargs="+", default=["base"])
  parser.add_argument("--compare", nargs="+", default=[])
  parser.add_argument("--dtype", help="default: bfloat16; on a CPU float32")
  parser.add_argument("--device", help="default: the best that JAX finds")
  parser.add_argument("--batch-sizes", type=int, nargs="+", default=[])
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--commit", help="of this code, where git is absent")
  parser.add_argument("--out", type=command.local_path, metavar="JSON")
  parser.add_argument("--plot", type=command.local_path, metavar="PNG")
  parser.add_argument("--table", action="store_true")
  args = parser.parse_args(argv)

  names = args.kinds
  shows = args.table or args.plot
  if not names and not shows:
    names = ["all"]
  in_float8 = args.dtype == float8.NAME
  known = kinds.IN_FLOAT8 if in_float8 else [*kinds.KINDS]
  of_dtype = f" of --dtype {float8.NAME}" if in_float8 else ""
  _check(f"KIND{of_dtype}", names, (*known, "all"))
  _check("--size", args.size, model_config.VARIANTS)
  _check("--compare", args.compare, kinds.COMPARISONS)
  if in_float8 and args.compare:
    raise command.UsageError(
      f"--dtype {float8.NAME} compares with {contest.UNROUNDED}, and with no "
      "other peer; leave out --compare"
    )
  _check("--dtype", [args.dtype] if args.dtype else [], DTYPES)
  _check("--device", [args.device] if args.device else [], DEVICES)
  _check_positive("--batch-sizes", args.batch_sizes)
  _check_positive("--repeats", [args.repeats])
  if shows and not args.out:
    raise command.UsageError("--table and --plot show the rows of --out")
  if names:
    if args.out:
      results.prepare(args.out)  # before anything is measured in vain
    _measure(known if "all" in names else names, args)
  if args.table:
    print(results.table(results.read(args.out)))
  if args.plot:
    number = roofline.draw(results.read(args.out), args.plot)
    print(f"{args.plot}: {number} points")
  return 0


def _measure(names: Sequence[str], args: argparse.Namespace) -> None:
  if args.device:
    jax.config.update("jax_platforms", args.device)
  devices.found()
  # Programs are compiled here and now.
  jax.config.update("jax_enable_compilation_cache", False)
  options = kinds.Options(
    args.compare, args.batch_sizes, args.repeats, args.dtype or ""
  )
  above = None
  for size in args.size:
    for name in names:
      row = kinds.measure_row(name, size, options)
      if args.commit:
        row["versions"] = row["versions"] | {"commit": args.commit}
      if results.heading(row) != above:
        above = results.heading(row)
        print(above)
      print(results.line(row), flush=True)
      if args.out:
        results.add(args.out, row)


def _check(option: str, found: Sequence[str], known: Collection[str]) -> None:
  for name in found:
    if name not in known:
      raise command.UsageError(
        f"{option}: expected one of {', '.join(known)}; found {name!r}"
      )


def _check_positive(option: str, found: Sequence[int]) -> None:
  for number in found:
    if number < 1:
      raise command.UsageError(f"{option}: expected 1 or more, found {number}")


if __name__ == "__main__":
  sys.exit(main())
