"""Plans a job for hardware that is not there: memory, time, money.

  python tools/plan.py --config pretrain_paper_base --topology v5e:16x16
  python tools/plan.py --config pretrain_paper_large --topology h100:4x8 \
    --mesh data=4,fsdp=8 --batch 2400 --price 2.5
  python tools/plan.py --config capfilt --topology h100:1x8 --images 1e9

compiles the programs that the job runs, ahead of time, and prints memory per
device, collectives, FLOPs, predicted time and MFU, and device-hours of the
whole run. An installed package has it as `python -m blip_jax.tools.plan`.

Topologies are v5e:16x16, v5p:4x4x4, v6e:8x8 (extra [tpu-aot]), h100:1x8,
h200:4x8 (hosts x GPUs; extra [gpu-aot]), and cpu:4, this machine's processor.
Keys of the config are flags, as for a job: --config.model.vit_remat=full.

--save FOLDER keeps the program of a training step, so that a job with
JAX_COMPILATION_CACHE_DIR=FOLDER starts without compiling it.

--search plans half, once and twice the batch with each remat policy on some
meshes, and repeats those that no other one beats in memory and speed.

The exit status is 3 if a program does not fit.
"""

import argparse
import logging
import re
import sys
from collections.abc import Sequence

import jax

from blip_jax.cli import command_line
from blip_jax.plan import labelling, programs, report, search, topology
from blip_jax.runtime import command, compilation_cache, sharding
from blip_jax.runtime.config import Config

DOES_NOT_FIT = 3


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--config", required=True, help="a recipe or its file")
  parser.add_argument("--topology", required=True, help=topology.NAMES)
  parser.add_argument("--mesh", help="such as data=4,fsdp=8; the rest is 1")
  parser.add_argument("--batch", type=int, help="examples of a step, in all")
  parser.add_argument("--price", type=float, help="of a device for an hour")
  parser.add_argument("--images", type=float, default=1e9, help="of CapFilt")
  parser.add_argument("--search", action="store_true")
  parser.add_argument("--save", metavar="FOLDER", help="of compiled programs")
  args, rest = parser.parse_known_args(argv)
  for name in ("batch", "price", "images"):
    value = getattr(args, name)
    if value is not None and not 0 < value < float("inf"):
      raise command.UsageError(f"--{name}: expected more than 0, found {value}")

  logging.getLogger("blip_jax").setLevel(logging.WARNING)
  jax.config.update("jax_platforms", "cpu")
  config = command_line.parse(["--config", args.config, *rest]).config
  config = config.copy_and_resolve_references()
  job = config.get("job")
  if job not in ("train", "capfilt"):
    raise command.UsageError(
      f"--config: {args.config} is a recipe for job={job!r}; only train and "
      "capfilt can be planned"
    )
  with config.unlocked():
    if args.mesh:
      config.mesh.update(_mesh(args.mesh))
    if args.batch:
      key = "batch_size" if job == "train" else "per_device_batch_size"
      config[key] = args.batch
  if args.search:
    _check_search(job, args)
  target = topology.parse(args.topology)
  if args.save:
    _check_save(job, target, args)
  for line in report.assumptions(target):
    print(line)
  if job == "capfilt":
    return _labelling(config, target, args)
  return (_search if args.search else _training)(config, target, args)


def _training(
  config: Config, target: topology.Topology, args: argparse.Namespace
) -> int:
  if args.save:
    compilation_cache.save_in(args.save)
  program, config = programs.training(config, target)
  for line in report.of_program(program, target):
    print(line)
  if args.save:
    saved = compilation_cache.seal(args.save)
    print(f"saved: {', '.join(saved) or 'nothing'}, in {args.save}")
  for line in report.of_run(program, target, config.num_steps, args.price):
    print(line)
  return 0 if report.fits(program, target) else DOES_NOT_FIT


def _check_search(job: str, args: argparse.Namespace) -> None:
  if job != "train":
    raise command.UsageError("--search: only a training has what it varies")
  if args.price is not None:
    raise command.UsageError(
      "--price: a search says images a second; plan the row that you choose, "
      "without --search, for its price"
    )


def _check_save(
  job: str, target: topology.Topology, args: argparse.Namespace
) -> None:
  if job != "train" or args.search:
    raise command.UsageError("--save: only the step of a training can be saved")
  if target.chip.platform == "gpu":
    raise command.UsageError(
      "--save: a GPU's own compiler tries its kernels out, and would not look "
      "for a program that was compiled without one; the first job on it fills "
      "the folder that JAX_COMPILATION_CACHE_DIR names"
    )


def _labelling(
  config: Config, target: topology.Topology, args: argparse.Namespace
) -> int:
  found = labelling.plan(config, target)
  for program in found:
    for line in report.of_program(program, target):
      print(line)
  for line in report.of_labelling(found, target, args.images, args.price):
    print(line)
  is_small = all(report.fits(program, target) for program in found)
  return 0 if is_small else DOES_NOT_FIT


def _search(
  config: Config, target: topology.Topology, args: argparse.Namespace
) -> int:
  tried = search.meshes(config, target)
  print(search.HEADER)
  rows = []
  for row in search.run(config, target, tried):
    rows.append(row)
    print(search.line(row, target), flush=True)
  best = search.pareto(rows, target)
  print("\nNone of them fits." if not best else f"\nPareto:\n{search.HEADER}")
  for row in best:
    print(search.line(row, target))
  return 0 if best else DOES_NOT_FIT


def _mesh(text: str) -> dict[str, int]:
  sizes: dict[str, int] = dict.fromkeys(sharding.AXES, 1)
  for part in text.split(","):
    found = re.fullmatch(r"(\w+)=(-1|[1-9]\d*)", part.strip())
    if found is None or found[1] not in sizes:
      raise command.UsageError(
        f"--mesh: expected sizes of {', '.join(sharding.AXES)}, such as "
        f"data=4,fsdp=8; found {part!r}"
      )
    sizes[found[1]] = int(found[2])
  return sizes


if __name__ == "__main__":
  sys.exit(main())
