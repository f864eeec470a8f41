"""Shows what a checkpoint holds, and digests that tell equal runs apart.

  python tools/inspect_checkpoint.py WORKDIR [--step N] [--digest]

Two runs that should be equal have equal lines under --digest: a sha256 over the
values of each item, independent of the mesh they were trained on.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence

import jax
from etils import epath

from blip_jax.runtime import command, snapshot


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
  files = _data_files(folder)
  size = sum(len(file.read_bytes()) for file in files)
  yield f"{'data':<12}{len(files):>8}{'':>16}{size:>16,}"


def digests(folder: epath.Path) -> Iterator[str]:
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
  parser.add_argument(
    "--digest", action="store_true", help="one line per item, with a sha256"
  )
  args = parser.parse_args(argv)
  path = epath.Path(args.workdir)
  if args.step is not None:
    path = path / snapshot.FOLDER / str(args.step)
  folder = snapshot.find(path)
  if args.digest:
    print("\n".join(digests(folder)))
  else:
    print(folder)
    print("\n".join(table(folder)))
  return 0


if __name__ == "__main__":
  # A digest of bytes needs no accelerator, and should not wait for one.
  jax.config.update("jax_platforms", "cpu")
  sys.exit(main())
