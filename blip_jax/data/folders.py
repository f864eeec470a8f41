"""Folders of pictures, with captions in files beside them or without any."""

import collections
import os
from collections.abc import Iterator, Sequence

import numpy as np

from blip_jax.data import sources, transforms

_TEXT = ".txt"
# Of what FFmpeg reads, what people keep.
VIDEOS = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".webm")
# What Hugging Face calls the table of a folder's captions.
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class Images:
  """Pictures without captions: files below a folder.

  Args:
    root: the folder, or "".
    names: the files' paths, which follow upon `root`; they are the ids.
  """

  def __init__(self, root: str, names: Sequence[str]):
    self._root = root
    self._names = _Names(names)

  def __len__(self) -> int:
    return len(self._names)

  def __getitem__(self, index: int) -> sources.Record:
    name = self._names[range(len(self))[index]]
    return {"image": os.path.join(self._root, name), "id": name}


class CaptionedImages(Images):
  """Pictures of a folder, each with its captions beside it: a.jpg, a.txt.

  Each line of the text is a caption; blank lines are not. A picture without a
  text and a text without a picture are bad rows.

  Raises:
    ValueError: no picture has a text.
  """

  def __init__(self, folder: str):
    names = listing(folder, beside=(_TEXT,))
    texts = {_stem(name) for name in names if name.endswith(_TEXT)}
    pictures = [_stem(name) for name in names if not name.endswith(_TEXT)]
    if texts.isdisjoint(pictures):
      raise ValueError(
        f"{folder}: expected captions beside the pictures (a.txt for a.jpg), "
        f"found none beside any of {len(pictures)} pictures. A table of "
        "captions may lie in the folder (metadata.csv with the columns "
        "file_name and caption), or be named instead of it."
      )
    lonely = texts.difference(pictures)
    super().__init__(
      folder,
      [n for n in names if not n.endswith(_TEXT) or _stem(n) in lonely],
    )

  def without_captions(self) -> Images:
    """The same rows, of which a text without a picture is none."""
    names = [self._names[row] for row in range(len(self))]
    return Images(self._root, names)

  def __getitem__(self, index: int) -> sources.Record:
    record = super().__getitem__(index)
    path, id = record["image"], record["id"]
    if path.endswith(_TEXT):
      detail = f"{path}: no picture beside it ({' '.join(transforms.ENDINGS)})"
      raise sources.BadRow(id, "missing_image", detail)
    return {**record, "caption": _captions(_stem(path) + _TEXT, id)}


def _captions(path: str, id: str) -> str | list[str]:
  try:
    with open(path, encoding="utf-8-sig", newline=None) as file:
      lines = [line.strip() for line in file]
  except FileNotFoundError as error:
    detail = f"{path}: no such file, which should hold the picture's captions"
    raise sources.BadRow(id, "missing_caption", detail) from error
  except (OSError, ValueError) as error:  # ValueError: no UTF-8
    raise sources.BadRow(id, "broken_row", f"{path}: {error}") from error
  captions = [line for line in lines if line]
  if not captions:
    raise sources.BadRow(id, "empty_caption", f"{path}: nothing in it")
  return captions if len(captions) > 1 else captions[0]


def metadata(folder: str) -> str | None:
  """Return the table of a folder's captions, if there is one.

  Raises:
    ValueError: there are several.
  """
  paths = [os.path.join(folder, name) for name in _METADATA]
  found = [path for path in paths if os.path.isfile(path)]
  if len(found) > 1:
    raise ValueError(
      f"{folder}: expected one table of captions, found {found}. Name one of "
      "them instead of the folder, which is then the image root."
    )
  return found[0] if found else None


def listing(
  folder: str,
  endings: Sequence[str] = transforms.ENDINGS,
  beside: Sequence[str] = (),
) -> list[str]:
  """Return the files of a folder and its subfolders, sorted by their paths.

  The paths start from the folder. Hidden files and folders are left out; links
  are followed.

  Args:
    endings: of the files that are wanted, in lower case.
    beside: of others that are listed with them.

  Raises:
    ValueError: there are none that are wanted.
  """
  names = sorted(n for n in _walk(folder) if _ending(n) in (*endings, *beside))
  if not any(_ending(name) in endings for name in names):
    counts = collections.Counter(_ending(name) for name in _walk(folder))
    found = ", ".join(f"{n} {e or 'without'}" for e, n in counts.most_common(5))
    what = "videos" if endings is VIDEOS else "pictures"
    raise ValueError(
      f"{folder}: expected {what} in it or in its subfolders, found files "
      f"with the endings: {found or 'no files'}. Understood are "
      f"{' '.join(endings)}; hidden files are left out."
    )
  return names


def _walk(
  folder: str, prefix: str = "", above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[str]:
  stat = os.stat(folder)
  here = stat.st_dev, stat.st_ino
  if here in above:  # a link to a folder that this one lies in
    return
  with os.scandir(folder) as entries:
    for entry in entries:
      if entry.name.startswith("."):
        continue
      if entry.is_dir():
        yield from _walk(entry.path, f"{prefix}{entry.name}/", above | {here})
      else:
        yield prefix + entry.name


def is_image(path: str) -> bool:
  return _ending(path) in transforms.ENDINGS


def _ending(path: str) -> str:
  return os.path.splitext(path)[1].lower()


def _stem(path: str) -> str:
  return os.path.splitext(path)[0]


class _Names:
  """Strings by number, without an object for each: millions, in any worker."""

  def __init__(self, names: Sequence[str]):
    encoded = [os.fsencode(name) for name in names]
    self._bytes = b"".join(encoded)
    self._ends = np.cumsum([0, *map(len, encoded)])

  def __len__(self) -> int:
    return len(self._ends) - 1

  def __getitem__(self, index: int) -> str:
    start, end = self._ends[index : index + 2].tolist()
    return os.fsdecode(self._bytes[start:end])
