"""The lines of a job on disk: those of a job that runs, and its result.

A line has a caption, an answer, or what is wrong with its row. A job collects a
line of JSON per row in `<out>.part<process>`. Until `<out>` replaces these
files, a line also has the `stamp` of its image: what was written for another
image, or for what a file was before, is made again.
"""

import contextlib
import json
import logging
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from blip_jax.data import sources
from blip_jax.runtime import files

log = logging.getLogger(__name__)

STAMP = "stamp"
_NUMBER = re.compile(r"0|[1-9][0-9]*")

Line = dict[str, Any]


def part(out: pathlib.PurePath, process: int) -> pathlib.PurePath:
  """The file of a process's lines."""
  return out.with_name(f"{out.name}.part{process}")


def parts(out: pathlib.PurePath) -> dict[int, pathlib.PurePath]:
  """Process -> the file of its lines, of all that are there.

  Raises:
    ValueError: something else has the name of one.
  """
  prefix = f"{out.name}.part"
  numbers = [
    int(name.removeprefix(prefix))
    for name in files.list_folder(out.parent)
    if name.startswith(prefix) and _NUMBER.fullmatch(name.removeprefix(prefix))
  ]
  found = {number: part(out, number) for number in sorted(numbers)}
  for path in found.values():
    refuse_other(path, "lines of this job are kept")
  return found


def refuse_other(path: pathlib.PurePath, what: str) -> None:
  """Raises `ValueError` if there is something, but no file."""
  if files.exists(path) and not files.is_file(path):
    raise ValueError(
      f"{path}: expected a file, since here {what}; found a folder, a pipe or "
      "a device. Rename it, or name another file with config.out"
    )


def unfinished(
  paths: Mapping[int, pathlib.PurePath],
  num_rows: int,
  is_current: Callable[[Line], bool],
) -> tuple[Int[np.ndarray, " n"], dict[int, set[int]]]:
  """What the parts lack.

  Args:
    paths: from `parts`.
    num_rows: of the source.
    is_current: whether a line is of an image that is there now.

  Returns:
    The rows without a line, and process -> where in its part (in bytes) lines
    start that are damaged or not current.
  """
  left, wrong = np.ones(num_rows, bool), {}
  for process, path in paths.items():
    wrong[process] = set()
    for start, line in _lines(path, num_rows):
      if line is not None and is_current(line):
        left[line["row"]] = False
      else:
        wrong[process].add(start)
  return np.flatnonzero(left), wrong


def clean(path: pathlib.PurePath, wrong: Collection[int]) -> None:
  """Drops lines of a part, by where they start, and a last one that is cut."""
  if not wrong:
    files.drop_partial_line(path)
    return
  log.warning(
    "%s: %d lines are damaged, or of images that have changed; these images "
    "are read again",
    path,
    len(wrong),
  )
  start = 0
  with files.open_atomic(path) as file:
    for raw in files.complete_lines(path):
      if start not in wrong:
        file.write(raw)
      start += len(raw)


def join(out: pathlib.PurePath, num_rows: int) -> tuple[int, str]:
  """Makes one file of all parts, in order of the rows, and removes these.

  If no image could be read, there is no file.

  Returns:
    The number of images that could not be read, and what is wrong with one.

  Raises:
    ValueError: some row has no line.
  """
  paths = [*parts(out).values()]
  is_bad, problem = np.zeros(num_rows, bool), ""
  # Of each row: the number of the part, and where in it the line starts.
  where = np.full((num_rows, 2), -1)
  for number, path in enumerate(paths):
    for start, line in _lines(path, num_rows):
      if line is not None:
        where[line["row"]] = number, start
        is_bad[line["row"]] = "error" in line
        if "error" in line:
          problem = problem or f", such as {line['id']}: {line['error']}"
  if num_missing := int((where[:, 0] < 0).sum()):
    raise ValueError(
      f"{out}: {num_missing} of {num_rows} images have no line, since what was "
      "written is damaged; the same command makes these again"
    )
  if not is_bad.all():
    with contextlib.ExitStack() as stack:
      opened = [stack.enter_context(files.open_read(path)) for path in paths]
      file = stack.enter_context(files.open_atomic(out))
      for number, start in where.tolist():
        opened[number].seek(start)
        line = json.loads(opened[number].readline())
        line.pop(STAMP, None)
        file.write(as_text(line).encode())
  for path in paths:
    files.remove(path)
  return int(is_bad.sum()), problem


def check_complete(out: pathlib.PurePath, source: Any) -> None:
  """Checks that a result has the line of every image, in order.

  Raises:
    ValueError: it is cut or damaged, or has lines of other images.
  """
  refuse_other(out, "the lines go")
  count = 0
  for _, line in _lines(out, len(source)):
    id = sources.row_id(source, count)
    if line is None or (line["row"], line["id"]) != (count, id):
      found = "is damaged" if line is None else f"is of {line['id']!r}"
      raise _incomplete(out, source, f"line {count + 1} {found}")
    count += 1
  if count < len(source):
    raise _incomplete(out, source, f"{count} complete lines")


def _incomplete(out: pathlib.PurePath, source: Any, found: str) -> ValueError:
  return ValueError(
    f"{out}: expected the lines of these images, a line for each of "
    f"{len(source)} rows, found: {found}. Delete it to do the work again, or "
    "name another file with config.out"
  )


def _lines(
  path: pathlib.PurePath, num_rows: int
) -> Iterator[tuple[int, Line | None]]:
  """Where each complete line starts, and its content; None if it is damaged."""
  start = 0
  for raw in files.complete_lines(path):
    try:
      line = json.loads(raw)
    except (ValueError, RecursionError):
      line = None
    yield start, line if _is_sound(line, num_rows) else None
    start += len(raw)


def _is_sound(line: Any, num_rows: int) -> bool:
  """Whether this is the line of a row, with what a model says, or an error."""
  return (
    isinstance(line, dict)
    and type(row := line.get("row")) is int
    and 0 <= row < num_rows
    and isinstance(line.get("id"), str)
    and (isinstance(line.get("error"), str) or _is_response(line))
  )


def _is_response(line: Any) -> bool:
  return (
    isinstance(line, dict)
    and any(isinstance(line.get(name), str) for name in ("caption", "answer"))
    and type(line.get("log_prob")) in (int, float)
    and type(line.get("score")) in (int, float)
    and isinstance(others := line.get("others", []), list)
    and all(map(_is_response, others))
  )


def as_text(line: Line) -> str:
  return json.dumps(line, ensure_ascii=False) + "\n"
