"""JSON and JSON Lines: rows by number, in files of any size."""

import json
import os
from typing import Any

from blip_jax.data import json_index, offsets, schema, sources
from blip_jax.runtime import files


class Annotations(sources.Source):
  """Rows of a JSON list or of JSON lines, as COCO, Flickr30k and BLIP use.

  A row is an object; see `schema.Columns` for its keys and the arguments.

  Raises:
    ValueError: on opening, if the file is no list of rows, is truncated, or
      none of its first rows has an image, a caption or a column to keep.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    image_root: str = "",
    with_captions: bool = True,
    *,
    image: str | None = None,
    caption: str | None = None,
    keep: tuple[str, ...] = (),
    needs_image: bool = True,
    with_questions: bool = False,
    image_file: str = "",
    with_statements: bool = False,
    names: str = "",
    with_dialogs: bool = False,
  ):
    self.path = sources.annotation_file(path)
    # NLVR2's files have lines, although their names end with ".json".
    has_lines = _is_jsonl(self.path) or (
      with_statements and json_index.is_object(self.path)
    )
    find = json_index.line_rows if has_lines else json_index.list_rows
    self._columns = schema.Columns(
      os.fspath(image_root),
      with_captions,
      image,
      caption,
      keep,
      needs_image,
      with_questions,
      image_file,
      with_statements,
      names,
      with_dialogs,
    )
    self._rows = offsets.Mapped(offsets.cached(self.path, "rows", find)[0])
    schema.search(
      self._columns.check,
      lambda index: self._parse(index, ""),
      len(self),
      self.path,
    )

  def __len__(self) -> int:
    return len(self._rows.array) - 1

  def _id(self, index: int) -> str:
    return f"{files.printable(os.path.basename(self.path))}:{index}"

  def _record(self, index: int, id: str) -> sources.Record:
    return self._columns.record(
      self._parse(index, id), id, f"{self.path}: row {index}"
    )

  def _parse(self, index: int, id: str) -> dict[str, Any]:
    start, end = (int(n) for n in self._rows.array[index : index + 2])
    raw = sources.read_row(self.path, start, end - start)
    try:
      row = json.loads(raw.decode("utf-8").rstrip().removesuffix(","))
    except (ValueError, RecursionError) as error:  # ValueError: also UTF-8
      detail = f"{self.path}: row {index} (byte {start}): {error}"
      raise sources.BadRow(id, "broken_row", detail) from error
    if not isinstance(row, dict):
      detail = (
        f"{self.path}: row {index}: expected an object, found {row!r:.200}"
      )
      raise sources.BadRow(id, "broken_row", detail)
    return row


def _is_jsonl(path: str) -> bool:
  return path.lower().endswith(".jsonl")
