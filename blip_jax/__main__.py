"""The command `blip-jax`, equal to `python -m blip_jax.main`."""

import sys

from blip_jax.runtime import stopping


def run() -> int:
  """Runs the command, and returns its exit status."""
  stopping.leave_if_asked()
  from blip_jax import main  # which imports jax, for seconds

  return main.run()


if __name__ == "__main__":
  sys.exit(run())
