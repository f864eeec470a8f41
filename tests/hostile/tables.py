"""Hostile Parquet files: footers that lie, or have a wrong byte."""

import io
import itertools
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow
import pyarrow.parquet as pq

_END = b"PAR1"


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
  file = io.BytesIO()
  pq.write_table(pyarrow.table(columns), file, store_schema=False, **options)
  return file.getvalue()


def with_rows(content: bytes, rows: int, of_file: int, of_group: int) -> bytes:
  """A file of one row group, with other numbers of rows in its footer.

  Args:
    content: of the file.
    rows: that it has; below 64.
    of_file: what the footer has for the file.
    of_group: what it has for the row group.
  """
  body, footer = _split(content)
  # Thrift: an integer of 64 bits, the next field. That of the file precedes the
  # list of row groups; that of a row group follows its size.
  field = b"\x16" + _integer(rows)
  at = footer.index(field + b"\x19\x1c")
  in_group = footer.index(field, at + len(field))
  new = footer[:at] + b"\x16" + _integer(of_file)
  new += footer[at + len(field) : _last(footer, field, in_group)]
  new += b"\x16" + _integer(of_group)
  new += footer[_last(footer, field, in_group) + len(field) :]
  return body + new + struct.pack("<I", len(new)) + _END


def _last(footer: bytes, field: bytes, start: int) -> int:
  """Where a row group has its rows: behind those of its columns."""
  at = start
  while (later := footer.find(field, at + 1)) >= 0:
    at = later
  return at


def _split(content: bytes) -> tuple[bytes, bytes]:
  (size,) = struct.unpack("<I", content[-8:-4])
  return content[: -8 - size], content[-8 - size : -8]


def _integer(value: int) -> bytes:
  """A number as Thrift packs it: zigzag, seven bits in each byte."""
  value = (value << 1) ^ (value >> 63)
  packed = b""
  while value > 127:
    packed += bytes([value & 127 | 128])
    value >>= 7
  return packed + bytes([value])


def footers() -> Iterator[bytes]:
  """Files of which one byte of the footer is wrong."""
  struct_image = [{"bytes": b"p", "path": "a"}]
  for columns in (
    {"image": struct_image * 4, "text": [["a b", "c"]] * 4},
    {"image": [b"p"] * 4, "text": ["a b"] * 4, "image_id": [1] * 4},
    {"image": ["a.png"] * 4, "text": ["a b"] * 4},
  ):
    content = parquet(columns, row_group_size=2)
    body, _ = _split(content)
    for at in range(len(body), len(content)):
      for value in {0, 127} - {content[at]}:
        yield content[:at] + bytes([value]) + content[at + 1 :]


def open_each(
  open_files: Callable[[list[str]], Any], folder: str, step: int
) -> tuple[int, int]:
  """Opens every `step`-th of `footers` beside a good file.

  Returns:
    The numbers of files tried, and of those that are reported as damaged.
  """
  good, bad = f"{folder}/good.parquet", f"{folder}/bad.parquet"
  pq.write_table(pyarrow.table({"image": ["a"], "text": ["b"]}), good)
  tried = reported = 0
  for content in itertools.islice(footers(), 0, None, step):
    with open(bad, "wb") as file:
      file.write(content)
    source = open_files([good, bad])
    assert source[0]["caption"] == "b", content
    for row in range(min(len(source), 6)):
      try:
        source[row]
      except Exception as error:
        assert hasattr(error, "reason"), content
    tried, reported = tried + 1, reported + bool(source.problems)
  return tried, reported
