"""Compares this package with the original BLIP, number by number.

  python -m tests.parity GOLDENS_DIR [--case NAME]

GOLDENS_DIR holds inputs, weights and outputs of the original code, as its
manifest.json describes.  Weights are loaded with the package's own converter.
Every array is used as an input, compared, or listed as missing.  The exit
status is 0 only if everything was compared and is within its tolerance.
"""

import argparse
import sys
from collections.abc import Sequence

import jax

from tests import parity
from tests.parity import goldens, verdicts


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m tests.parity",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("folder", metavar="GOLDENS_DIR")
  parser.add_argument("--case", metavar="NAME", help="default: all cases")
  parser.add_argument(
    "--vocab",
    metavar="DIR",
    help="the vocabulary of bert-base-uncased, for the tokenizer's goldens",
  )
  args = parser.parse_args(argv)
  try:
    folder = goldens.Folder(args.folder, args.vocab)
  except ValueError as error:
    print(f"{parser.prog}: {error}", file=sys.stderr)
    return 1
  checks = parity.run(folder, args.case)
  print("\n".join(verdicts.table(checks)))
  return int(any(check.verdict != verdicts.OK for check in checks))


if __name__ == "__main__":
  # The goldens were computed on a CPU, and the models are tiny.
  jax.config.update("jax_platforms", "cpu")
  sys.exit(main())
