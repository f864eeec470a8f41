"""Runs the benchmark of a checkout; see `tools/bench/__main__.py`."""

import sys

from bench import __main__ as benchmark

if __name__ == "__main__":
  sys.exit(benchmark.main())
