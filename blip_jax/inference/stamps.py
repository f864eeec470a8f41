"""Whether images are still those of before, told without reading them.

The stamp of a file is its size and its times. One of these no program can set,
so that files that swap their names, or are unpacked over others, are noticed.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from typing import Any

from blip_jax.data import sources
from blip_jax.runtime import files

# Of a file, of all shards, or of what is not there.
Stamp = list[int] | str | None


class Stamps:
  """The stamps of a source's images, as JSON has them.

  An image that is a file has that file's. Those inside of the source's own
  files, such as shards, all have one, which says whether any of these changed.

  Args:
    source: random access to records.
  """

  def __init__(self, source: Any):
    self._source = source
    shards = [_of_file(path) for path in getattr(source, "paths", ())]
    self.of_shards = hashlib.sha256(json.dumps(shards).encode()).hexdigest()

  def of(self, record: sources.Record) -> Stamp:
    """The stamp of a record's image now."""
    path = sources.image_path(record)
    return _of_file(path) if path else self.of_shards

  def digest(self, rows: Iterable[int]) -> str:
    """One hash of the ids and stamps of rows."""
    found = hashlib.sha256(self.of_shards.encode())
    for row in rows:
      id, stamp = sources.row_id(self._source, row), None
      with contextlib.suppress(sources.BadRow):
        stamp = self.of(self._source[row])
      found.update(json.dumps([id, stamp]).encode())
      if stamp == self.of_shards:
        break  # so do the others, and reading them reads their images
    return found.hexdigest()


def _of_file(path: str) -> list[int] | None:
  try:
    found = files.stat(path)
  except (OSError, ValueError):  # ValueError: no path can be so
    return None
  return [found.size, found.modified_ns, found.changed_ns]
