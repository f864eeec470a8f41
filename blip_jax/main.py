"""The entry point: a command line, devices of all processes, and the job."""

import contextlib
import faulthandler
import logging
import os
import sys
from collections.abc import Sequence

from blip_jax.runtime import stopping

if __name__ == "__main__":
  stopping.leave_if_asked()  # jax is imported next, which takes seconds

from absl import flags
from absl import logging as absl_logging

from blip_jax import context, evaluate, train
from blip_jax.capfilt import audit, bootstrap, merge, report
from blip_jax.capfilt import job as capfilt
from blip_jax.cli import command_line, config_help, recipes
from blip_jax.inference import answer_images, caption_images, search
from blip_jax.runtime import (
  command,
  compilation_cache,
  host,
  joining,
  overrides,
  processes,
)
from blip_jax.runtime.command import UsageError
from blip_jax.runtime.config import Config
from blip_jax.serve import demo, service

JOBS = {
  "train": train.train,
  "evaluate": evaluate.evaluate,
  "caption": caption_images.caption_images,
  "answer": answer_images.answer_images,
  "search": search.search,
  "capfilt": capfilt.run,
  "merge": merge.merge,
  "report": report.report,
  "bootstrap": bootstrap.bootstrap,
  "demo": demo.demo,
  "serve": service.serve,
  "status": audit.status,
  "verify": audit.verify,
}

# Jobs that several processes would do several times.
ALONE = ("search", "merge", "report", "status", "verify", "demo", "serve")

# Jobs whose configs have the same keys.
SAME_KEYS = (
  ("train", "evaluate"),
  ("capfilt", "merge", "report", "status", "verify"),
)


@command.reports_errors
def run(argv: Sequence[str] | None = None) -> None:
  """The command `blip-jax`, equal to `python -m blip_jax.main`."""
  argv = sys.argv[1:] if argv is None else argv
  if command_line.wants_help(argv):
    print(config_help.text(argv, JOBS))
  else:
    main(command_line.parse(argv))


def main(line: command_line.Command) -> None:
  """Runs the job of a command line, and prints its results."""
  config = line.config
  check_job(str(config.get("job", "")), str(line.own.get("job", "")))
  if line.distributed != "off" and config.job in ALONE:
    raise UsageError(
      f"config.job={config.job} runs as one process; leave out --distributed"
    )
  prepare_process()
  if config.get("compilation_cache"):
    compilation_cache.enable()
  if config.job != "capfilt":  # whose processes share the work by themselves
    joining.warn_if_apart(line.distributed)
  joining.join(line.distributed)
  joining.check_same(config, line.workdir)
  with _stoppable(config.job):
    _run(config, line)


def _run(config: Config, line: command_line.Command) -> None:
  if config.job in SAME_KEYS[0]:
    config = context.yield_to_model(
      config, line.workdir, line.given, line.own.model.variant
    )
  results = JOBS[config.job](config, line.workdir)
  if processes.is_first():
    for metric, value in results.items():
      print(f"{metric:32} {value:.4g}")
    if config.job not in ("demo", "serve"):  # which leave none
      print(f"Results are in {_results(config, line.workdir)}")


def _results(config: Config, workdir: str) -> str | os.PathLike:
  """The file or folder of what a job made."""
  if config.job == "merge":
    return str(config.merge.out)
  if config.job == "evaluate":
    return evaluate.results_folder(config, workdir)
  return str(config.get("out") or workdir)


def check_job(job: str, own_job: str) -> None:
  """Checks that a job exists, and that the config has its keys.

  Args:
    job: asked for.
    own_job: of the config itself.

  Raises:
    UsageError: names similar jobs, or the recipes of the job.
  """
  if job not in JOBS:
    near = " or ".join(overrides.nearest(job, [*JOBS]))
    raise UsageError(
      f"config.job: expected one of {sorted(JOBS)}, found {job!r}."
      + (f" Did you mean {near}?" if near else "")
    )
  jobs = next((jobs for jobs in SAME_KEYS if job in jobs), (job,))
  if own_job not in jobs:
    made = [name for job in jobs for name in recipes.with_value("job", job)]
    raise UsageError(
      f"config.job: this config is one of {own_job!r} and lacks the keys of "
      f"{job!r}; recipes that have them: {', '.join(made)}"
    )


def prepare_process() -> None:
  """Sets up logging, crash reports, flags of libraries, and memory."""
  faulthandler.enable()
  flags.FLAGS.mark_as_parsed()  # worker processes of grain read them
  absl_logging.use_absl_handler()
  # Only our own: at INFO, Orbax reports every file that it renames.
  absl_logging.set_verbosity(absl_logging.WARNING)
  absl_logging.get_absl_logger().addFilter(_is_news)
  sys.unraisablehook = _tell_unraisable
  logging.getLogger("blip_jax").setLevel(logging.INFO)
  host.keep_freed_memory()
  host.keep_imported()


def _is_news(record: logging.LogRecord) -> bool:
  """Whether a message is not one of Orbax's about errors that it also raises.

  For a disk that is full it logs a hundred of them, with all their tracebacks.
  """
  return record.exc_info is None or "orbax" not in record.pathname


def _tell_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
  """Leaves out what TensorStore reports to a save that has failed already."""
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


def _stoppable(job: str) -> contextlib.AbstractContextManager[None]:
  """Ends a job of several processes when it is asked to, except a training.

  JAX listens to SIGTERM since the processes joined, and lets them agree on the
  step after which a training stops.
  """
  if job == "train" or not processes.has_peers():
    return contextlib.nullcontext()
  return stopping.handled_by(stopping.at_once)


if __name__ == "__main__":
  sys.exit(run())
