"""Shows what a checkpoint holds, finds damage, and tells equal runs apart.

  python tools/inspect_checkpoint.py WORKDIR [--step N] [--digest | --verify]

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
from collections.abc import Iterator, Sequence

import jax
from etils import epath

from blip_jax.runtime import best, command, digests, files, snapshot

DAMAGED, UNVERIFIED = 1, 3


def table(folder: epath.Path) -> Iterator[str]:
  """Yields a line per item: leaves, numbers in them, bytes."""
  yield f"{'item':<12}{'leaves':>8}{'numbers':>16}{'bytes':>16}"
  for name in snapshot.ARRAYS:
    if not (folder / name).exists():
      continue
    leaves = jax.tree.leaves(snapshot.stored(folder, name))
    numbers = sum(leaf.size for leaf in leaves)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    yield f"{name:<12}{len(leaves):>8}{numbers:>16,}{size:>16,}"
  positions = _data_files(folder)
  size = sum(len(file.read_bytes()) for file in positions)
  yield f"{'data':<12}{len(positions):>8}{'':>16}{size:>16,}"


def verify(path: epath.Path) -> int:
  """Prints a line for each checkpoint; returns the exit status.

  Args:
    path: a run's folder, a folder of steps, or one step's.
  """
  roots = [path, path / snapshot.FOLDER, path / best.FOLDER]
  folders = [
    root / str(step) for root in roots for step in sorted(snapshot.steps(root))
  ]
  if not folders and snapshot.holds_one(path):
    folders = [path]
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
  for name in snapshot.ARRAYS:
    if (folder / name).exists():
      yield f"{name} {snapshot.digest(snapshot.load_to_host(folder, name))}"
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
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    "--digest", action="store_true", help="one line per item, with a sha256"
  )
  args = parser.parse_args(argv)
  path = epath.Path(args.workdir)
  if args.step is not None:
    path = path / snapshot.FOLDER / str(args.step)
  if args.verify:
    return verify(path.absolute())
  folder = snapshot.find(path)
  if args.digest:
    print("\n".join(value_digests(folder)))
  else:
    print(folder)
    print("\n".join(table(folder)))
  return 0


if __name__ == "__main__":
  # A digest of bytes needs no accelerator, and should not wait for one.
  jax.config.update("jax_platforms", "cpu")
  sys.exit(main())
