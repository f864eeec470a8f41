"""Pairs of pictures and texts as files that training reads."""

import contextlib
import io
import json
import os
import pathlib
import shutil
import tarfile
import uuid
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
import PIL.Image

from blip_jax.data import transforms
from blip_jax.runtime import (
  files,
)

PAIRS_A_SHARD = 10_000
# What a file begins with; others become PNG, which loses nothing.
_KINDS = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"))
# Of a row, what goes along with its text.
_ALONG = ("key", "source", "itm_prob", "itc_cosine", "log_prob")

# A picture as a record has it: a path, encoded bytes or pixels.
Image = str | bytes | np.ndarray


@runtime_checkable
class Writer(Protocol):
  def add(self, row: dict[str, Any], image: Callable[[], Image]) -> None:
    """Adds a pair: a row of `capfilt.rows`, and where its picture is had.

    Raises:
      transforms.BadSample: there is no such picture.
    """


def of_source(path: pathlib.Path, kind: str) -> pathlib.Path:
  """The output for one kind of texts: clean.web.json, or clean/web."""
  if path.suffix in (".json", ".jsonl"):
    return path.with_suffix(f".{kind}{path.suffix}")
  return path / kind


@contextlib.contextmanager
def open_writer(path: pathlib.Path) -> Iterator[Writer]:
  """A writer whose files appear when all is written, or never.

  Args:
    path: of a .json or a .jsonl, for pictures that are files of their own, or
      of a folder of tar shards.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix in (".json", ".jsonl"):
    with files.open_atomic(path) as file:
      writer = _Rows(file, path.suffix == ".jsonl")
      yield writer
      writer.close()
    return
  if path.suffix:
    raise ValueError(
      f"config.merge.out: expected a .json, a .jsonl or a folder for tar "
      f"shards, found {path}"
    )
  if path.exists():
    raise ValueError(
      f"config.merge.out: {path} is there already; name another folder, or "
      "move it away first"
    )
  temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
  temporary.mkdir()
  try:
    with contextlib.closing(_Shards(temporary)) as writer:
      yield writer
    os.replace(temporary, path)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


class _Rows:
  """A JSON list, or JSON lines, of pictures that lie elsewhere."""

  def __init__(self, file: BinaryIO, lines: bool):
    self._file = file
    self._start, self._next, self._end = (
      ("", "\n", "\n") if lines else ("[\n", ",\n", "\n]\n")
    )
    self._empty = True

  def add(self, row: dict[str, Any], image: Callable[[], Image]) -> None:
    if not row["image"]:
      raise ValueError(
        f"config.merge.out: the picture of {row['key']} is no file of its own, "
        "so a list cannot point to it; name a folder, for webdataset shards"
      )
    own = {"image": row["image"], "caption": row["text"]}
    if row["image_id"] is not None:
      own["image_id"] = row["image_id"]
    before = self._start if self._empty else self._next
    text = before + json.dumps(own | _along(row), ensure_ascii=False)
    self._file.write(text.encode())
    self._empty = False

  def close(self) -> None:
    self._file.write(self._end.encode())


class _Shards:
  """Webdataset shards, of so many pairs each; the same bytes each time."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self._number = 0
    self._tar: tarfile.TarFile | None = None

  def add(self, row: dict[str, Any], image: Callable[[], Image]) -> None:
    shard, place = divmod(self._number, PAIRS_A_SHARD)
    if not place:
      self.close()
      path = self._folder / f"{shard:05d}.tar"
      self._tar = tarfile.open(path, "w")  # noqa: SIM115
    content, kind = _encoded(image())
    own = _along(row) | {"image_id": row["image_id"], "image": row["image"]}
    for suffix, part in (
      (kind, content),
      ("txt", row["text"].encode()),
      ("json", json.dumps(own).encode()),
    ):
      member = tarfile.TarInfo(f"{self._number:09d}.{suffix}")
      member.size = len(part)
      self._tar.addfile(member, io.BytesIO(part))
    self._number += 1

  def close(self) -> None:
    if self._tar is not None:
      self._tar.close()
      self._tar = None


def _along(row: dict[str, Any]) -> dict[str, Any]:
  return {name: row[name] for name in _ALONG if row.get(name) is not None}


def _encoded(image: Image) -> tuple[bytes, str]:
  """The bytes of a picture as it is stored, and their kind."""
  if isinstance(image, str):
    try:
      image = pathlib.Path(image).read_bytes()
    except OSError as error:
      raise transforms.BadSample("missing", str(error)) from error
  if isinstance(image, bytes):
    for magic, kind in _KINDS:
      if image.startswith(magic):
        return image, kind
  pixels = transforms.decode(image, transforms.MAX_PIXELS)
  file = io.BytesIO()
  PIL.Image.fromarray(np.asarray(pixels)).save(file, "png")
  return file.getvalue(), "png"
