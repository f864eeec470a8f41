"""Files that evaluators write beside their metrics."""

import contextlib
import logging
import os
from collections.abc import Iterator

log = logging.getLogger(__name__)


class ResultFile:
  """A file of the workdir that the first process writes.

  If it cannot be written, such as on a full disk, a training says so and goes
  on: the metrics are worth more, and the next evaluation tries again. A job
  that only evaluates fails.

  Args:
    path: of the file.
    required: whether what goes wrong is raised.
  """

  def __init__(self, path: str | os.PathLike, required: bool = True):
    self._path = path
    self._required = required

  @contextlib.contextmanager
  def writing(self) -> Iterator[str | os.PathLike]:
    """Gives the path to the code that writes it.

    Raises:
      OSError: it is required, and cannot be written.
    """
    try:
      yield self._path
    except OSError as error:
      if self._required:
        raise
      log.warning("%s is not written: %s", self._path, error)
