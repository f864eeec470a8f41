"""Exports a model as programs that run without this package.

  python tools/export.py MODEL OUT --format stablehlo
  python tools/export.py MODEL OUT --format onnx --programs caption \
    --num-beams 3 --max-length 20 --weights int8
  python tools/export.py MODEL OUT --format hf

MODEL is what `blip_jax.load` takes. OUT is a new folder with a file for each
program (encode, caption, answer, match: those that the model has), a JSON file
that says what goes in and comes out, and the vocabulary. Each file is then run
in a fresh process, and the largest differences from the model's own outputs are
printed.

StableHLO: one file for CPUs, CUDA and TPUs, and batches of any size (extra
[stablehlo]). ONNX, OpenVINO: one file from uint8 pixels to token ids, beam
search included, for batches of --batch-size (extras [onnx], [openvino]), with
weights in float32 or int8. hf: the whole model in Hugging Face's layout, as
`tools/convert_checkpoint.py MODEL OUT --layout hf` writes it.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from blip_jax.convert import opening, write
from blip_jax.export import artifacts, formats, programs
from blip_jax.inference import loading
from blip_jax.models import families
from blip_jax.runtime import command, host


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("model", metavar="MODEL")
  parser.add_argument("out", metavar="OUT", type=command.local_path)
  parser.add_argument(
    "--format", choices=[*formats.FORMATS, "hf"], required=True
  )
  parser.add_argument(
    "--programs", nargs="+", default=(), help="default: all of the model"
  )
  parser.add_argument(
    "--batch-size", type=int, help="of ONNX and OpenVINO; default: 1"
  )
  parser.add_argument(
    "--weights", choices=formats.WEIGHTS, default="float32", help="of the same"
  )
  parser.add_argument(
    "--task", choices=families.FAMILIES, help="family; default: MODEL's"
  )
  parser.add_argument(
    "--tokenizer",
    metavar="DIR",
    type=command.local_path,
    help="a folder with vocab.txt, or a hub id; default: MODEL's",
  )
  for name in _OPTIONS:
    parser.add_argument(
      f"--{name.replace('_', '-')}", type=int, help="default: the model's"
    )
  args = parser.parse_args(argv)
  out = pathlib.Path(args.out)
  artifacts.refuse_existing(out)
  options = {
    name: value
    for name in _OPTIONS
    if (value := getattr(args, name)) is not None
  }
  if args.format == "hf":
    programs_asked = args.programs or args.batch_size is not None or options
    if programs_asked or args.weights != "float32":
      raise ValueError(
        "--format hf writes the model, not its programs: leave out --programs, "
        "--batch-size, --weights and options of generation"
      )
    checkpoint = opening.open_checkpoint(
      args.model, task=args.task, tokenizer=args.tokenizer
    )
    print(f"written: {write.write(checkpoint, out, 'hf')}")
    return 0
  chosen = formats.get(args.format, args.weights)
  batch_size = _batch_size(args.batch_size, args.format, chosen.any_batch)
  model = loading.load(args.model, task=args.task, tokenizer=args.tokenizer)
  found = artifacts.write(
    model,
    programs.programs_of(model, args.programs, **options),
    out,
    args.format,
    batch_size,
    args.weights,
  )
  for program, differences in found.items():
    print(f"{program}: largest differences, in a fresh process")
    for output, difference in differences.items():
      print(f"  {output:18} {difference:.1e}")
  print(f"written: {args.out}")
  return 0


def _batch_size(asked: int | None, format: str, any_batch: bool) -> int:
  if asked is None:
    return 1
  if any_batch:
    raise ValueError(
      f"--batch-size: a file of --format {format} serves batches of any size; "
      "leave it out"
    )
  if not 1 <= asked <= _MOST_ROWS:
    raise ValueError(f"--batch-size: expected 1 to {_MOST_ROWS}, found {asked}")
  return asked


# So many images are computed to compare the outputs.
_MOST_ROWS = 4096
_OPTIONS = ("num_beams", "max_length", "min_length", "num_return_sequences")


if __name__ == "__main__":
  host.keep_freed_memory()
  sys.exit(main())
