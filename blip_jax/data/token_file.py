"""Flickr8k's and Flickr30k's captions: `results.token`."""

import os

from blip_jax.data import grouped, offsets, schema, sources
from blip_jax.runtime import files


class TokenFile(sources.Source):
  r"""Images of a file of lines "1000092795.jpg#0\tA caption.".

  A row is an image with all its captions, in the order of the first ones. See
  `schema.Columns` for the arguments.

  Raises:
    ValueError: on opening, if no line has this form.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    image_root: str = "",
    with_captions: bool = True,
    *,
    keep: tuple[str, ...] = (),
  ):
    self.path = sources.annotation_file(path)
    self._columns = schema.Columns(
      os.fspath(image_root), with_captions, keep=keep
    )
    index, _ = offsets.cached(self.path, "images", _index)
    self._images = grouped.Grouped(self.path, index)
    schema.search(
      self._columns.check,
      lambda row: self._parse(row, ""),
      len(self),
      self.path,
    )

  def __len__(self) -> int:
    return len(self._images)

  def _id(self, index: int) -> str:
    return f"{files.printable(os.path.basename(self.path))}:{index}"

  def _record(self, index: int, id: str) -> sources.Record:
    row = self._parse(index, id)
    return self._columns.record(row, id, f"{self.path}: image {index}")

  def _parse(self, index: int, id: str) -> dict[str, str | list[str]]:
    name, captions = b"", []
    for line in self._images[index]:
      name, caption = _split(line)
      captions.append(caption)
    try:
      texts = [caption.decode("utf-8") for caption in captions]
    except UnicodeDecodeError as error:
      detail = f"{self.path}: image {index}: {error}"
      raise sources.BadRow(id, "broken_row", detail) from error
    if not name:
      detail = (
        f"{self.path}: image {index}: expected an image's name, '#', a number, "
        f"a tab and a caption, found {texts[0]!r:.200}"
      )
      raise sources.BadRow(id, "broken_row", detail)
    return {"image": os.fsdecode(name), "caption": texts}


def _split(line: bytes) -> tuple[bytes, bytes]:
  """Returns image and caption; no image and the line if it has another form."""
  key, tab, caption = line.rstrip(b"\r\n").partition(b"\t")
  name, _, number = key.rpartition(b"#")
  if not tab or not number.isdigit():
    return b"", line
  return name, caption


def _index(path: str) -> tuple[grouped.Parts, list[str]]:
  """Groups the lines by image; lines of another form are on their own."""
  data, first = offsets.open_text(path)
  if first is None:
    raise ValueError(f"{path}: expected lines of captions, found nothing.")
  starts = offsets.line_starts(data, first).tolist()
  spans = list(zip(starts, [*starts[1:], len(data)], strict=True))
  numbers: dict[bytes | int, int] = {}
  rows = []
  for start, end in spans:
    is_readable = end - start <= sources.MAX_ROW_BYTES
    name = _split(bytes(data[start:end]))[0] if is_readable else b""
    rows.append(numbers.setdefault(name or start, len(numbers)))
  return grouped.parts(rows, spans), []
