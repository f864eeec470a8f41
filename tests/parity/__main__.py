"""Compares this package with the original, number by number.

  python tools/check_parity.py GOLDENS_DIR [--case NAME] [--allow-missing]

GOLDENS_DIR holds inputs, weights and outputs of the original code, as its
manifest.json describes.  Weights go through the converter that users have;
every array is an input, compared, or listed as missing.  Exits with 0 only if
everything was compared and holds.
"""

import argparse
import sys
from collections.abc import Sequence

import jax

from tests import parity
from tests.parity import goldens, verdicts


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("folder", metavar="GOLDENS_DIR")
  parser.add_argument("--case", metavar="NAME", help="default: all")
  parser.add_argument(
    "--vocab",
    metavar="DIR",
    help="BERT's own vocabulary, which the goldens of its tokenizer need",
  )
  parser.add_argument(
    "--allow-missing",
    action="store_true",
    help="lists what nothing was compared with, but does not fail for it",
  )
  args = parser.parse_args(argv)
  try:
    folder = goldens.Folder(args.folder, args.vocab)
  except ValueError as error:
    print(f"check_parity: {error}", file=sys.stderr)
    return 1
  checks = parity.run(folder, args.case)
  print("\n".join(verdicts.table(checks)))
  allowed = {verdicts.OK}
  if args.allow_missing:
    allowed.add(verdicts.MISSING)
  return int(any(check.verdict not in allowed for check in checks))


if __name__ == "__main__":
  # The goldens are a CPU's numbers, and the models tiny.
  jax.config.update("jax_platforms", "cpu")
  sys.exit(main())
