"""Folders of images, with captions in files next to them or without any."""

import collections
import os
from collections.abc import Iterator, Sequence

import numpy as np

from blip_jax.data import sources, transforms
from blip_jax.runtime import files

_TEXT = ".txt"
# Common formats that FFmpeg reads.
VIDEOS = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".webm")
# Names of a folder's table of captions, as in Hugging Face datasets.
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class Images:
  """Images without captions: files below a folder.

  Args:
    root: the folder, or "".
    names: the files' paths relative to `root`, which are also their ids, as
      `files.printable` writes them.
  """

  def __init__(self, root: str, names: Sequence[str]):
    self._root = root
    self._names = _Names(names)

  def __len__(self) -> int:
    return len(self._names)

  def __getitem__(self, index: int) -> sources.Record:
    name = self._names[range(len(self))[index]]
    path = os.path.join(self._root, name)
    return {"image": path, "id": files.printable(name)}


class CaptionedImages(Images):
  """Images of a folder, each with a text file next to it: a.jpg, a.txt.

  Each line of the text file is a caption; blank lines are skipped. An image
  without a text file and a text file without an image are bad rows.

  Raises:
    ValueError: no image has a text file.
  """

  def __init__(self, folder: str):
    names = listing(folder, also=(_TEXT,))
    texts = {_stem(name) for name in names if name.endswith(_TEXT)}
    images = [_stem(name) for name in names if not name.endswith(_TEXT)]
    if texts.isdisjoint(images):
      raise ValueError(
        f"{folder}: expected captions next to the images (a.txt for a.jpg), "
        f"found none for any of {len(images)} images. Alternatively put a "
        "table of captions into the folder (metadata.csv with the columns "
        "file_name and caption), or name a table instead of the folder."
      )
    unmatched = texts.difference(images)
    super().__init__(
      folder,
      [n for n in names if not n.endswith(_TEXT) or _stem(n) in unmatched],
    )

  def without_captions(self) -> Images:
    """The same rows without captions; a text file alone is a bad row."""
    names = [self._names[row] for row in range(len(self))]
    return Images(self._root, names)

  def __getitem__(self, index: int) -> sources.Record:
    record = super().__getitem__(index)
    path, id = record["image"], record["id"]
    if path.endswith(_TEXT):
      detail = f"{path}: no image next to it ({' '.join(transforms.ENDINGS)})"
      raise sources.BadRow(id, "missing_image", detail)
    return {**record, "caption": _captions(_stem(path) + _TEXT, id)}


def _captions(path: str, id: str) -> str | list[str]:
  try:
    with files.open_text(path) as file:
      lines = [line.strip() for line in file]
  except FileNotFoundError as error:
    detail = (
      f"{path}: no such file, which should have the captions of the image"
    )
    raise sources.BadRow(id, "missing_caption", detail) from error
  except (OSError, ValueError) as error:  # ValueError: not UTF-8
    raise sources.BadRow(id, "broken_row", f"{path}: {error}") from error
  captions = [line for line in lines if line]
  if not captions:
    raise sources.BadRow(id, "empty_caption", f"{path}: no text in it")
  return captions if len(captions) > 1 else captions[0]


def metadata(folder: str) -> str | None:
  """Returns the table of a folder's captions, None if there is none.

  Raises:
    ValueError: there is more than one.
  """
  paths = [os.path.join(folder, name) for name in _METADATA]
  tables = [path for path in paths if files.is_file(path)]
  if len(tables) > 1:
    raise ValueError(
      f"{folder}: expected one table of captions, found {tables}. Name one of "
      "them as the source, with the folder as image root."
    )
  return tables[0] if tables else None


def listing(
  folder: str,
  endings: Sequence[str] = transforms.ENDINGS,
  also: Sequence[str] = (),
) -> list[str]:
  """Returns the files of a folder and its subfolders, sorted by path.

  Paths are relative to the folder. Hidden files and folders are skipped; links
  are followed.

  Args:
    endings: endings of the files to list, in lower case.
    also: endings of further files to list.

  Raises:
    ValueError: there is no file with one of `endings`.
  """
  names = sorted(n for n in _walk(folder) if _ending(n) in (*endings, *also))
  if not any(_ending(name) in endings for name in names):
    counts = collections.Counter(_ending(name) for name in _walk(folder))
    common = counts.most_common(5)
    endings_found = ", ".join(f"{n} {e or 'without'}" for e, n in common)
    what = "videos" if endings is VIDEOS else "images"
    raise ValueError(
      f"{folder}: expected {what} in it or in its subfolders, found files "
      f"with the endings: {endings_found or 'no files'}. Supported endings are "
      f"{' '.join(endings)}; hidden files are skipped."
    )
  return names


def _walk(root: str) -> Iterator[str]:
  # Links may form circles: a folder is skipped if it is one of those above it.
  above = {root: frozenset([files.real_path(root)])}
  for folder, subfolders, names in files.walk(root):
    parents = above.pop(folder)
    children = {
      name: files.real_path(os.path.join(folder, name))
      for name in subfolders
      if not name.startswith(".")
    }
    subfolders[:] = [n for n, real in children.items() if real not in parents]
    for name in subfolders:
      above[os.path.join(folder, name)] = parents | {children[name]}
    prefix = folder[len(root) :].lstrip("/")
    for name in names:
      if not name.startswith("."):
        yield os.path.join(prefix, name)


def is_image(path: str) -> bool:
  return _ending(path) in transforms.ENDINGS


def _ending(path: str) -> str:
  return os.path.splitext(path)[1].lower()


def _stem(path: str) -> str:
  return os.path.splitext(path)[0]


class _Names:
  """Strings by number, without an object for each: there may be millions."""

  def __init__(self, names: Sequence[str]):
    encoded = [os.fsencode(name) for name in names]
    self._bytes = b"".join(encoded)
    self._ends = np.cumsum([0, *map(len, encoded)])

  def __len__(self) -> int:
    return len(self._ends) - 1

  def __getitem__(self, index: int) -> str:
    start, end = self._ends[index : index + 2].tolist()
    return os.fsdecode(self._bytes[start:end])
