"""Image-text pairs as files that training reads."""

import contextlib
import io
import json
import pathlib
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
import PIL.Image

from blip_jax.data import rejects, transforms
from blip_jax.runtime import copies, files

PAIRS_PER_SHARD = 10_000
_SHARD = re.compile(r"\d{5}\.tar")
# First bytes of the formats that are stored unchanged. Others become PNG, which
# is lossless.
_FORMATS = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"))
# Columns of a row that are written along with its text.
_METADATA = ("key", "source", "itm_prob", "itc_cosine", "log_prob")

# An image of a record: a path, encoded bytes or pixels.
Image = str | bytes | np.ndarray


@runtime_checkable
class Writer(Protocol):
  def add(self, row: dict[str, Any], read_image: Callable[[], Image]) -> None:
    """Adds a pair.

    Args:
      row: as in `capfilt.rows`, with the path of the image as it is on disk.
      read_image: returns its image; called only if the image is copied.

    Raises:
      transforms.BadSample: the image cannot be read.
    """
    ...


def for_kind(path: pathlib.PurePath, kind: str) -> pathlib.PurePath:
  """The output for one kind of texts: clean.web.json, or clean/web."""
  if path.suffix in (".json", ".jsonl"):
    return path.with_suffix(f".{kind}{path.suffix}")
  return path / kind


@contextlib.contextmanager
def open_writer(
  path: pathlib.PurePath, replace: bool = False
) -> Iterator[Writer]:
  """Yields a writer whose output appears once it is complete, or never.

  Args:
    path: a .json or .jsonl file, for images that are files of their own, or a
      folder of tar shards.
    replace: whether a file, or a folder of nothing but shards, that is there
      may be replaced.

  Raises:
    ValueError: the path has another suffix, or what is there stays.
  """
  files.make_folder(path.parent)
  if files.exists(path) and not (replace and _is_output(path)):
    raise ValueError(
      f"config.merge.out: {path} already exists, and is not the output of an "
      "earlier merge with its .stats.json; name another file or folder, or "
      "move it away first"
    )
  if path.suffix in (".json", ".jsonl"):
    with files.open_atomic(path) as file:
      writer = _ListWriter(file, is_lines=path.suffix == ".jsonl")
      yield writer
      writer.close()
    return
  if path.suffix:
    raise ValueError(
      f"config.merge.out: expected a .json, a .jsonl or a folder for tar "
      f"shards, found {path}"
    )
  if files.is_remote(path):
    with files.temporary_folder() as temporary:
      with contextlib.closing(_ShardWriter(temporary)) as writer:
        yield writer
      _replace_remote(temporary, path)
    return
  temporary, earlier = files.temporary_path(path), files.temporary_path(path)
  files.make_folder(temporary)
  try:
    with contextlib.closing(_ShardWriter(temporary)) as writer:
      yield writer
    if files.exists(path):  # a folder with files cannot be replaced at once
      files.rename(path, earlier)
    files.rename(temporary, path)
    files.remove_folder(earlier)
  finally:
    files.remove_folder(temporary)


def _replace_remote(folder: pathlib.Path, path: pathlib.PurePath) -> None:
  """Copies a folder of shards; deletes those of an earlier one behind it."""
  copies.copy_folder(folder, path)
  for name in {*files.list_folder(path)} - {*files.list_folder(folder)}:
    files.remove(path / name)


def _is_output(path: pathlib.PurePath) -> bool:
  """Whether it is a file, or a folder with nothing but shards."""
  return files.is_file(path) or all(
    _SHARD.fullmatch(name) for name in files.list_folder(path)
  )


class _ListWriter:
  """A JSON list, or JSON lines, that refers to image files."""

  def __init__(self, file: BinaryIO, is_lines: bool):
    self._file = file
    self._start, self._separator, self._end = (
      ("", "\n", "\n") if is_lines else ("[\n", ",\n", "\n]\n")
    )
    self._is_empty = True

  def add(self, row: dict[str, Any], read_image: Callable[[], Image]) -> None:
    if not row["image"]:
      raise ValueError(
        f"config.merge.out: the image of {row['key']} is not a file of its "
        "own, so a list cannot refer to it; name a folder, which gets "
        "webdataset shards"
      )
    item = {"image": row["image"], "caption": row["text"]}
    if row["image_id"] is not None:
      item["image_id"] = row["image_id"]
    line = json.dumps(item | _metadata(row), ensure_ascii=False)
    prefix = self._start if self._is_empty else self._separator
    # A path that is no UTF-8 text has the escapes by which JSON can say it.
    self._file.write((prefix + line).encode(errors="backslashreplace"))
    self._is_empty = False

  def close(self) -> None:
    self._file.write(self._end.encode())


class _ShardWriter:
  """Webdataset shards of `PAIRS_PER_SHARD`; equal pairs give equal bytes."""

  def __init__(self, folder: pathlib.PurePath):
    self._folder = folder
    self._num_pairs = 0
    self._shard = contextlib.ExitStack()
    self._tar: tarfile.TarFile | None = None

  def add(self, row: dict[str, Any], read_image: Callable[[], Image]) -> None:
    shard, index_in_shard = divmod(self._num_pairs, PAIRS_PER_SHARD)
    if self._tar is None or not index_in_shard:
      self._tar = self._open(shard)
    image, suffix = _read(read_image)
    path = row["image"] and files.printable(row["image"])
    metadata = _metadata(row) | {"image_id": row["image_id"], "image": path}
    for name, content in (
      (suffix, image),
      ("txt", row["text"].encode()),
      ("json", json.dumps(metadata).encode()),
    ):
      member = tarfile.TarInfo(f"{self._num_pairs:09d}.{name}")
      member.size = len(content)
      self._tar.addfile(member, io.BytesIO(content))
    self._num_pairs += 1

  def _open(self, shard: int) -> tarfile.TarFile:
    self._shard.close()
    file = self._shard.enter_context(
      files.open_atomic(self._folder / f"{shard:05d}.tar")
    )
    return self._shard.enter_context(tarfile.open(fileobj=file, mode="w"))

  def close(self) -> None:
    self._shard.close()


def _metadata(row: dict[str, Any]) -> dict[str, Any]:
  return {name: row[name] for name in _METADATA if row.get(name) is not None}


def _read(read_image: Callable[[], Image]) -> tuple[bytes, str]:
  """Returns `_encoded(read_image())`; whatever it raises is a `BadSample`."""
  try:
    return _encoded(read_image())
  except transforms.BadSample:
    raise
  except Exception as error:
    if rejects.hits_all(error):
      raise
    detail = f"{type(error).__name__}: {error}"
    raise transforms.BadSample("error", detail) from error


def _encoded(image: Image) -> tuple[bytes, str]:
  """Returns the stored bytes of an image, or a PNG of it, and a suffix."""
  if isinstance(image, str):
    try:
      image = files.read_bytes(image)
    except FileNotFoundError as error:
      raise transforms.BadSample("missing", image) from error
    except (OSError, ValueError) as error:  # ValueError: no name of a file
      raise transforms.BadSample("unreadable", f"{image}: {error}") from error
  if isinstance(image, bytes):
    for first_bytes, suffix in _FORMATS:
      if image.startswith(first_bytes):
        return image, suffix
  file = io.BytesIO()
  with transforms.decoded(image, transforms.MAX_PIXELS) as pixels:
    PIL.Image.fromarray(pixels).save(file, "png")
  return file.getvalue(), "png"
