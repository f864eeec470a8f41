"""The entry point: flags, devices of all processes, and the config's job."""

import logging
import pathlib
import sys
from collections.abc import Sequence

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from blip_jax import evaluate, recipes, train
from blip_jax.capfilt import audit, bootstrap, merge, report
from blip_jax.capfilt import job as capfilt
from blip_jax.inference import caption_images, search
from blip_jax.runtime import files, host

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of the run; runs/<name of the config> by default. If it holds a run, "
  "the run is resumed.",
)
_DISTRIBUTED = flags.DEFINE_string(
  "distributed",
  "off",
  "Whether other processes take part: off, auto (Cloud TPU, Slurm, Open MPI), "
  "or HOST:PORT,PROCESSES,INDEX of the first process.",
)

JOBS = {
  "train": train.train,
  "evaluate": evaluate.evaluate,
  "caption": caption_images.caption_images,
  "search": search.search,
  "capfilt": capfilt.run,
  "merge": merge.merge,
  "report": report.report,
  "bootstrap": bootstrap.bootstrap,
  "status": audit.status,
  "verify": audit.verify,
}


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  # Only our own: at INFO, Orbax reports every file that it renames.
  absl_logging.set_verbosity(absl_logging.WARNING)
  logging.getLogger("blip_jax").setLevel(logging.INFO)
  join_processes(_DISTRIBUTED.value)
  host.keep_freed_memory()
  config = _CONFIG.value
  name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"]))
  workdir = files.absolute(_WORKDIR.value or f"runs/{name.stem}")
  if config.job not in JOBS:
    raise app.UsageError(
      f"config.job: expected one of {sorted(JOBS)}, found {config.job!r}"
    )
  results = JOBS[config.job](config, workdir)
  if jax.process_index() == 0:
    for metric, value in results.items():
      print(f"{metric:32} {value:.4g}")
    print(f"Results are in {config.get('out') or workdir}")


def join_processes(how: str) -> None:
  """Makes the devices of all processes visible as one set."""
  if how == "off":
    return
  if how == "auto":
    jax.distributed.initialize()
    return
  try:
    address, processes, index = how.split(",")
    processes, index = int(processes), int(index)
  except ValueError as error:
    raise app.UsageError(
      f"--distributed: expected off, auto or HOST:PORT,PROCESSES,INDEX, found "
      f"{how!r}"
    ) from error
  jax.distributed.initialize(address, processes, index)


def parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses flags; a bare name after --config is a recipe of the package."""
  try:
    return app.parse_flags_with_usage(recipes.with_paths(argv))
  except ValueError as error:
    sys.exit(f"FATAL Flags parsing error: {error}")


def run() -> None:
  """The command `blip-jax`, equal to `python -m blip_jax.main`."""
  flags.mark_flag_as_required("config")
  app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
  run()
