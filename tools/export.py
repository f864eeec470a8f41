"""Exports a model as programs that run without this package.

  python tools/export.py MODEL OUT --format stablehlo
  python tools/export.py MODEL OUT --format onnx --programs caption \
    --num-beams 3 --max-length 20

MODEL is what `blip_jax.load` takes. OUT is a new folder with a file for each
program (encode, caption, answer, match: those that the model has), a JSON file
that says what goes in and comes out, and the vocabulary. Each file is then run
in a fresh process, and the largest differences from the model's own outputs are
printed.

StableHLO: one file for CPUs, CUDA and TPUs, and batches of any size (extra
[stablehlo]). ONNX: one file from uint8 pixels to token ids, beam search
included, for batches of --batch-size (extra [onnx]). The layout of Hugging Face
is written by `tools/convert_checkpoint.py --layout hf`.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from blip_jax.export import artifacts, formats, programs
from blip_jax.inference import loading
from blip_jax.runtime import command, host


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("model", metavar="MODEL")
  parser.add_argument("out", metavar="OUT", type=command.local_path)
  parser.add_argument("--format", choices=formats.FORMATS, required=True)
  parser.add_argument(
    "--programs", nargs="+", default=(), help="default: all of the model"
  )
  parser.add_argument(
    "--batch-size", type=int, default=1, help="of ONNX; default: 1"
  )
  for name in _OPTIONS:
    parser.add_argument(
      f"--{name.replace('_', '-')}", type=int, help="default: the model's"
    )
  args = parser.parse_args(argv)
  if args.batch_size < 1:
    raise ValueError(
      f"--batch-size: expected 1 or more, found {args.batch_size}"
    )
  formats.get(args.format)
  options = {
    name: value
    for name in _OPTIONS
    if (value := getattr(args, name)) is not None
  }
  model = loading.load(args.model)
  found = artifacts.write(
    model,
    programs.programs_of(model, args.programs, **options),
    pathlib.Path(args.out),
    args.format,
    args.batch_size,
  )
  for program, differences in found.items():
    print(f"{program}: largest differences, in a fresh process")
    for output, difference in differences.items():
      print(f"  {output:18} {difference:.1e}")
  print(f"written: {args.out}")
  return 0


_OPTIONS = ("num_beams", "max_length", "min_length", "num_return_sequences")


if __name__ == "__main__":
  host.keep_freed_memory()
  sys.exit(main())
