"""A job that writes a line of JSON for every row of a source.

The lines that are written, see `lines`, and the settings of the job in
`<out>.job.json` let a job that was stopped resume. These stay beside the result
and say what it was made with.
"""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int

from blip_jax.data import (
  examples,
  loader,
  question_groups,
  rejects,
  sources,
)
from blip_jax.inference import lines, stamps
from blip_jax.inference import model as model_lib
from blip_jax.runtime import (
  files,
  lock,
  progress,
  resumable,
  saved_arrays,
  sharding,
)

log = logging.getLogger(__name__)


class Work(NamedTuple):
  """How the rows that are left are read.

  Attributes:
    source: the rows, or `question_groups.Groups` of them.
    example: record -> model inputs.
    batch_size: records, of all devices together.
  """

  source: Any
  example: examples.Example
  batch_size: int


class _Note(NamedTuple):
  """What a line says besides the response.

  Attributes:
    id: of the row.
    path: of the image; "" if it has none.
    line: the rest.
  """

  id: str
  path: str
  line: dict[str, Any]


# What a line says of its row besides the id.
_NOTED = ("image_id", "image", "question_id", "question", lines.STAMP)
# In `<out>.job.json` once the job is done, besides the settings.
_RESULT = "sha256"


@dataclasses.dataclass(frozen=True)
class LineJob:
  """What a job does with the rows of a source.

  Attributes:
    source: random access to records.
    name: of the source, for errors.
    out: the file of all lines, which appears when it is complete.
    settings: everything that changes the lines.
    work: how to read rows, from a source of those that are left.
    respond: what the lines of a batch say, from its arrays: as many for each
      record as a group has places.
    mesh: the devices.
    num_threads: that read rows.
    after: is called with the path of the image and the line of each row that
      could be read.
  """

  source: Any
  name: str
  out: pathlib.PurePath
  settings: Mapping[str, Any]
  work: Callable[[sources.Rows], Work]
  respond: Callable[[examples.Arrays], Sequence[dict[str, Any]]]
  mesh: jax.sharding.Mesh
  num_threads: int
  after: Callable[[str, lines.Line], None] | None = None

  def run(self, held: lock.Lock) -> dict[str, int]:
    """Writes the lines of the rows that have none yet, and one file of all.

    With several processes, each works on its share of the rows.

    Args:
      held: on `out`.

    Returns:
      The number of images, and of those that could not be read.

    Raises:
      ValueError: no row can be read, the job was started with other settings,
        or `out` has something else than the lines of these rows.
    """
    source, out = self.source, self.out
    if files.exists(out):
      _check_finished(out, self.settings, source)
      log.warning("%s is complete; delete it to do the work again", out)
      return {"images": len(source)}
    known = stamps.Stamps(source)
    rows = _begin(out, self.settings, source, known)
    log.info("%d of %d rows to do", len(rows), len(source))
    work = self.work(sources.Rows(source, rows))
    todo = sources.Noted(work.source, lambda _, record: _notes(record, known))
    groups = _rows_of_records(work.source, rows)
    batch_size = sharding.padded_batch_size(work.batch_size, self.mesh)
    batches = loader.eval_loader(
      todo,
      work.example,
      batch_size // jax.process_count(),
      num_threads=self.num_threads,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      bad_samples=(bad := rejects.Reasons()),
    )
    bar = progress.bar(
      total=len(source),
      initial=len(source) - len(rows),
      unit="img",
      disable=jax.process_index() > 0,
    )
    with bar, files.open_append(lines.part(out, jax.process_index())) as part:
      for positions, ids, arrays in _numbered(batches):
        held.check()
        responses, written = self.respond(arrays), 0
        for n, (position, id) in enumerate(zip(positions, ids, strict=True)):
          if not id:  # padding of the last batch
            continue
          own = groups[position][groups[position] >= 0].tolist()
          notes = todo.notes.pop(position, None) or self._no_notes(own)
          reason = bad.by_id.pop(id, None)
          first = n * groups.shape[1]
          said = responses[first : first + len(own)]
          for row, note, response in zip(own, notes, said, strict=True):
            line = self._line(row, note, reason, response)
            part.write(lines.as_text(line))
          written += len(own)
        part.flush()
        bar.update(min(written * jax.process_count(), bar.total - bar.n))
    return self._joined()

  def _no_notes(self, rows: Sequence[int]) -> list[_Note]:
    """What lines say of rows that could not be read."""
    ids = [sources.row_id(self.source, row) or "" for row in rows]
    return [_Note(id, "", {}) for id in ids]

  def _line(
    self, row: int, note: _Note, reason: str | None, response: dict[str, Any]
  ) -> lines.Line:
    """The line of a row; `reason` says why its image could not be read."""
    line = {"row": row, "id": note.id, **note.line}
    if reason is not None:
      return line | {"error": reason}
    line |= response
    if self.after:
      self.after(note.path, line)
    return line

  def _joined(self) -> dict[str, int]:
    _sync("parts are written")
    num_bad, problem = 0, ""
    if jax.process_index() == 0:
      num_bad, problem = lines.join(self.out, len(self.source))
      _finish(self.out, self.settings)
    # The others wait here for the first one, however long it takes.
    counts = multihost_utils.process_allgather(np.array([num_bad]))
    num_bad = int(counts.sum())
    if num_bad == len(self.source):
      raise ValueError(
        f"{self.name}: none of {num_bad} images could be read{problem}"
      )
    log.info("All lines are in %s", self.out)
    return {"images": len(self.source), "unreadable": num_bad}


def model_settings(model: model_lib.Model, dtype: str) -> dict[str, Any]:
  """What a model and its dtype change in the lines."""
  params = model.params
  if jax.process_count() > 1:
    # No process holds all parts of all parameters.
    params = multihost_utils.process_allgather(params, tiled=True)
  return {
    "weights": saved_arrays.digest(params),
    "dtype": dtype,
    "image_size": list(model.card.config.vit.image_size),
  }


def _sync(what: str) -> None:
  """Waits until all processes are here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"line_job: {what}")


def _begin(
  out: pathlib.PurePath,
  settings: Mapping[str, Any],
  source: Any,
  known: stamps.Stamps,
) -> Int[np.ndarray, " n"]:
  """Starts a job, or resumes it; returns the rows that have no line yet.

  Lines that are damaged, or of images that have changed, are dropped.

  Raises:
    ValueError: the job was started with other settings.
  """
  job, parts = _job(out), lines.parts(out)
  if parts and not files.exists(job):
    found = next(iter(parts.values()))
    raise ValueError(
      f"{found}: has captions of a job, but there is no {job.name} with its "
      "settings; delete the file to start again"
    )
  hint = (
    "Use the same settings, name another file with config.out, or delete "
    f"{job} and the files {out}.part<number> to start again"
  )
  process, count = jax.process_index(), jax.process_count()
  # Of a result that somebody has deleted, the settings are of no use.
  is_over = not parts and _RESULT in (resumable.settings(job) or {})
  resumable.begin(job, settings, hint, is_over, write=process == 0)
  is_current = functools.partial(_is_current, source=source, known=known)
  rows, wrong = lines.unfinished(parts, len(source), is_current)
  # All processes have read before one of them writes.
  _sync("parts are read")
  for number, part in parts.items():
    if number % count == process:
      lines.clean(part, wrong[number])
  return rows


def _finish(out: pathlib.PurePath, settings: Mapping[str, Any]) -> None:
  """Notes what the result is, beside what made it."""
  if files.exists(out):
    files.write_json(_job(out), {**settings, _RESULT: files.sha256(out)})
  else:  # no image could be read
    files.remove(_job(out))


def _check_finished(
  out: pathlib.PurePath, settings: Mapping[str, Any], source: Any
) -> None:
  """Checks that this job would write what is there.

  Raises:
    ValueError: other settings made it, or it is cut or damaged.
  """
  lines.check_complete(out, source)
  there = resumable.settings(job := _job(out))
  if there is None:
    log.warning("%s is missing: nobody knows what model made %s", job, out)
    return
  sha256 = there.pop(_RESULT, None)
  hint = f"Name another file with config.out, or delete {out} to start again"
  resumable.refuse_others(job, there, resumable.as_read(settings), hint)
  if sha256 is None:  # stopped between the two files
    _finish(out, settings)
  elif sha256 != (found := files.sha256(out)):
    raise files.DamagedFile(
      out,
      f"its SHA-256 is {found}, and was {sha256} when it was written",
      f"Delete it to caption the images again, or {job} if you have changed it",
    )


def _is_current(line: lines.Line, source: Any, known: stamps.Stamps) -> bool:
  """Whether a line says of its row's image what it would say now."""
  row = line["row"]
  if line["id"] != sources.row_id(source, row):
    return False
  if line.get(lines.STAMP) == known.of_shards:
    return True  # to read the row would be to read its image
  try:
    now = _note(source[row], known)
  except sources.BadRow:
    now = {}
  return all(line.get(key) == now.get(key) for key in _NOTED)


def _rows_of_records(
  source: Any, rows: Int[np.ndarray, " n"]
) -> Int[np.ndarray, "G m"]:
  """Which of `rows` each record is about: the questions of a group, with -1
  where there are fewer, or one."""
  if isinstance(source, question_groups.Groups):
    return np.where(source.rows < 0, -1, rows[source.rows])
  return rows[:, None]


def _notes(record: sources.Record, known: stamps.Stamps) -> list[_Note]:
  """What the lines of a record say besides the responses."""
  return [
    _Note(each["id"], sources.image_path(each), _note(each, known))
    for each in record.get("asked", [record])
  ]


def _note(record: sources.Record, known: stamps.Stamps) -> dict[str, Any]:
  """What a line says besides the record's id: the `image_id` if there is one,
  the path if the id is not the end of it, and the stamp of the image."""
  image_id, path = sources.image_id(record), sources.image_path(record)
  note: dict[str, Any] = {lines.STAMP: known.of(record)}
  if image_id is not None:
    note["image_id"] = image_id
  for name in ("question_id", "question"):
    if name in record:
      note[name] = record[name]
  if path and not (printable := files.printable(path)).endswith(record["id"]):
    note["image"] = printable
  return note


def _numbered(
  batches: loader.EvalLoader,
) -> Iterator[tuple[range, list[str], dict[str, np.ndarray]]]:
  """This process's batches, with the positions of their rows in `todo`."""
  for number, (arrays, ids) in enumerate(batches):
    block = number * jax.process_count() + jax.process_index()
    start = block * len(ids)
    yield range(start, start + len(ids)), ids, arrays


def _job(out: pathlib.PurePath) -> pathlib.PurePath:
  return out.with_name(f"{out.name}.job.json")
