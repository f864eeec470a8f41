"""Whether images are still those of before, told without reading them.

The stamp of a file is its size and its times. One of these no program can set,
so that files that swap their names, or are unpacked over others, are noticed.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

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
    """One hash of the ids and stamps of rows.

    Of images that are no files, only the first is read, and its content is
    part of the hash.
    """
    found = hashlib.sha256(self.of_shards.encode())
    for row in rows:
      try:
        record = self._source[row]
      except sources.BadRow as bad:
        found.update(f"{bad.id!a}\n".encode())
        continue
      found.update(f"{record['id']!a} {self.of(record)}\n".encode())
      if not sources.image_path(record):
        found.update(np.asarray(record["image"]).tobytes())
        break
    return found.hexdigest()


def _of_file(path: str) -> list[int] | None:
  try:
    found = files.stat(path)
  except (OSError, ValueError):  # ValueError: no path can be so
    return None
  return [found.size, found.modified_ns, found.changed_ns]
