"""Shows what a checkpoint holds, finds damage, and tells equal runs apart.

  python tools/inspect_checkpoint.py WORKDIR [--step N] \\
    [--steps | --arrays | --digest | --verify]

--steps prints a line for each step, and for the best parameters: its bytes on
disk, how many processes saved it, and when. --arrays prints a line for each
array: its type and shape, its bytes, and the axes of the mesh that split its
dimensions when it was saved.

Two runs that should be equal have equal lines under --digest: a sha256 over the
values of each item, independent of the mesh they were trained on.

--verify reads all steps, and the best parameters, and prints a line for each.
Its exit status is
  0  all are sound
  1  at least one is damaged, or there is none
  3  none is damaged, but some have no digests, and cannot be verified
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Iterator, Sequence

import jax
from etils import epath

from blip_jax.runtime import (
  best,
  command,
  digests,
  files,
  saved_arrays,
  saved_items,
  snapshot,
)

DAMAGED, UNVERIFIED = 1, 3


def table(folder: epath.Path) -> Iterator[str]:
  """Yields a line per item: leaves, numbers in them, bytes."""
  yield f"{'item':<12}{'leaves':>8}{'numbers':>16}{'bytes':>16}"
  for name in saved_items.ARRAYS:
    if not (folder / name).exists():
      continue
    leaves = jax.tree.leaves(saved_arrays.stored(folder, name))
    numbers = sum(leaf.size for leaf in leaves)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    yield f"{name:<12}{len(leaves):>8}{numbers:>16,}{size:>16,}"
  positions = _data_files(folder)
  size = sum(len(file.read_bytes()) for file in positions)
  yield f"{'data':<12}{len(positions):>8}{'':>16}{size:>16,}"


def steps(path: epath.Path) -> Iterator[str]:
  """Yields a line per checkpoint; `path` is as of `_all`."""
  yield f"{'bytes':>16}{'processes':>12}  {'saved':<21}checkpoint"
  for folder in _all(path):
    sizes = [
      files.size(f"{root}/{name}")
      for root, _, names in files.walk(folder)
      for name in names
    ]
    # Written last, by the clock of the host that saved it.
    saved = files.stat(folder / "meta" / "meta.json").modified
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(saved))
    processes = len(_data_files(folder)) or "-"
    yield f"{sum(sizes):>16,}{processes:>12}  {when:<21}{folder}"


def arrays(folder: epath.Path) -> Iterator[str]:
  """Yields a line per array of a checkpoint."""
  for name in saved_items.ARRAYS:
    if not (folder / name).exists():
      continue
    found = saved_arrays.by_path(saved_arrays.stored(folder, name))
    split = saved_arrays.shardings(folder, name)
    for path, leaf in sorted(found.items()):
      size = leaf.size * leaf.dtype.itemsize
      shape = f"{leaf.dtype.name}{list(leaf.shape)}".replace(" ", "")
      yield f"{size:>16,}  {shape:<28} {split[path]:<24} {name}/{path}"


def _all(path: epath.Path) -> list[epath.Path]:
  """The checkpoints of a run's folder, of a folder of steps, or of one step."""
  roots = [path, path / snapshot.FOLDER, path / best.FOLDER]
  folders = [
    root / str(step) for root in roots for step in sorted(snapshot.steps(root))
  ]
  return [path] if not folders and snapshot.holds_one(path) else folders


def verify(path: epath.Path) -> int:
  """Prints a line for each checkpoint; returns the exit status.

  Args:
    path: as of `_all`.
  """
  folders = _all(path)
  if not folders:
    print(f"{path} holds no checkpoint")
  statuses = [_verify_one(folder) for folder in folders]
  return DAMAGED if DAMAGED in statuses else max(statuses, default=DAMAGED)


def _verify_one(folder: epath.Path) -> int:
  lines = digests.damage(folder)
  # A run that goes on may have deleted it meanwhile.
  if lines and not files.exists(folder):
    return 0
  if not (folder / "params").exists():
    lines.append("params/ is missing")
  if lines:
    print(f"{folder}: damaged: {'; '.join(lines)}")
    return DAMAGED
  if not digests.exists(folder):
    print(f"{folder}: not verified: it has no {digests.NAME}")
    return UNVERIFIED
  print(f"{folder}: sound")
  return 0


def value_digests(folder: epath.Path) -> Iterator[str]:
  """Yields `<item> <sha256>` for each item, or `<item> absent`."""
  for name in saved_items.ARRAYS:
    if (folder / name).exists():
      arrays = saved_arrays.load_to_host(folder, name)
      yield f"{name} {saved_arrays.digest(arrays)}"
    else:
      yield f"{name} absent"
  data = hashlib.sha256()
  for file in _data_files(folder):
    data.update(f"{file.name}\n{file.read_text()}\n".encode())
  yield f"data {data.hexdigest()}"


def _data_files(folder: epath.Path) -> list[epath.Path]:
  return sorted((folder / "data").glob("process_*.json"))


@command.reports_errors
def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "workdir", type=command.local_path, help="a run's folder, or one step's"
  )
  parser.add_argument("--step", type=int, help="default: the latest")
  output = parser.add_mutually_exclusive_group()
  output.add_argument(
    "--verify",
    action="store_true",
    help="a line per step and exit status 0 if all are sound, 1 if one is "
    "damaged, 3 if one has no digests",
  )
  output.add_argument(
    "--steps", action="store_true", help="a line per step, with its size"
  )
  output.add_argument(
    "--arrays",
    action="store_true",
    help="a line per array, with its type, shape, size and sharding",
  )
  output.add_argument(
    "--digest", action="store_true", help="one line per item, with a sha256"
  )
  args = parser.parse_args(argv)
  path = epath.Path(args.workdir)
  if args.step is not None:
    path = path / snapshot.FOLDER / str(args.step)
  if args.verify:
    return verify(path.absolute())
  folder = snapshot.find(path)
  if args.steps:
    print("\n".join(steps(path.absolute())))
  elif args.arrays:
    print("\n".join(arrays(folder)))
  elif args.digest:
    print("\n".join(value_digests(folder)))
  else:
    print(folder)
    print("\n".join(table(folder)))
  return 0


if __name__ == "__main__":
  # A digest of bytes needs no accelerator, and should not wait for one.
  jax.config.update("jax_platforms", "cpu")
  sys.exit(main())
