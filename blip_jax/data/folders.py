"""Folders of images, with captions in files next to them or without any."""

import collections
import contextlib
import io
import os
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

from blip_jax.data import rejects, sources, transforms
from blip_jax.runtime import files, trees

# Of text files, in lower case: that of the first kind is read if an image has
# both. Kohya's tools write .caption.
_TEXTS = (".txt", ".caption")
# Common formats that FFmpeg reads.
VIDEOS = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".webm")
# Names of a folder's table of captions, as in Hugging Face datasets.
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_MAX_ENDINGS = 10  # listed in a message


class Images(sources.Source):
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

  def _id(self, index: int) -> str:
    return files.printable(self._names[index])

  def _record(self, index: int, id: str) -> sources.Record:
    return {"image": os.path.join(self._root, self._names[index]), "id": id}


class CaptionedImages(Images):
  """Images of a folder, each with a text file next to it: a.jpg, a.txt.

  The text file may also be a.caption, which is not read if there is an a.txt.
  Each line of it is a caption; blank lines are skipped. An image without a text
  file and a text file without an image are bad rows.

  Raises:
    ValueError: no image has a text file.
  """

  def __init__(self, folder: str):
    names = listing(folder, also=_TEXTS)
    text_names = [name for name in names if _is_text(name)]
    texts = {_stem(name) for name in text_names}
    images = [_stem(name) for name in names if not _is_text(name)]
    if texts.isdisjoint(images):
      raise ValueError(
        f"{folder}: expected captions next to the images (a.txt for a.jpg), "
        f"found none for any of {len(images)} images. Alternatively put a "
        "table of captions into the folder (metadata.csv with the columns "
        "file_name and caption), or name a table instead of the folder."
      )
    unmatched = texts.difference(images)
    if len(texts) < len(text_names):
      sources.warn_once(
        f"{folder}: text files that are not used, because the image has "
        f"another one: {len(text_names) - len(texts)}"
      )
    # As they are written: the case of a file's name matters.
    self._endings = _by_preference({os.path.splitext(n)[1] for n in text_names})
    super().__init__(
      folder,
      [n for n in names if not _is_text(n) or _stem(n) in unmatched],
    )

  def without_captions(self) -> Images:
    """The same rows without captions; a text file alone is a bad row."""
    names = [self._names[row] for row in range(len(self))]
    return Images(self._root, names)

  def _record(self, index: int, id: str) -> sources.Record:
    record = super()._record(index, id)
    path = record["image"]
    if _is_text(path):
      detail = f"{path}: no image next to it ({' '.join(transforms.ENDINGS)})"
      raise sources.BadRow(id, "missing_image", detail)
    text_path = text_file(path, self._endings)
    if text_path is None:
      detail = (
        f"{_stem(path)}{_TEXTS[0]}: no such file, which should have the "
        "captions of the image"
      )
      raise sources.BadRow(id, "missing_caption", detail)
    return {**record, "caption": _captions(text_path, id)}


def text_file(
  image: str, endings: Sequence[str] = (*_TEXTS, *map(str.upper, _TEXTS))
) -> str | None:
  """Returns the text file next to an image; None if there is none.

  Args:
    endings: that it may have, the preferred ones first.
  """
  paths = (_stem(image) + ending for ending in endings)
  return next((path for path in paths if files.is_file(path)), None)


def _captions(path: str, id: str) -> str | list[str]:
  try:
    text = sources.read_small(path).decode("utf-8-sig")
  except files.Unavailable:
    raise
  except (OSError, ValueError) as error:  # ValueError: not UTF-8
    raise sources.BadRow(id, "broken_row", f"{path}: {error}") from error
  lines = io.StringIO(text, newline=None)
  captions = [stripped for line in lines if (stripped := line.strip())]
  if not captions:
    raise sources.BadRow(id, "empty_caption", f"{path}: no text in it")
  return captions if len(captions) > 1 else captions[0]


def metadata(folder: str) -> str | None:
  """Returns the table of a folder's captions, None if there is none.

  Raises:
    ValueError: there is more than one.
  """
  named = [
    os.path.join(folder, name)
    for name in files.list_folder(folder)
    if name.lower() in _METADATA
  ]
  tables = [path for path in named if files.is_file(path)]
  for path in sorted({*named} - {*tables}):
    sources.warn_once(f"{path}: no regular file, so it is not used")
  if len(tables) > 1:
    raise ValueError(
      f"{folder}: expected one table of captions, found {tables}. Name one of "
      "them as the source, with the folder as image root."
    )
  return tables[0] if tables else None


def warn_of_unlisted(folder: str, table: str, source: Any) -> None:
  """Counts images of a folder that its table does not list, and other files.

  Args:
    source: the rows of the table.
  """
  try:
    names = listing(folder)
  except ValueError:  # the images are in the table
    return
  listed = set()
  for row in range(len(source)):
    with contextlib.suppress(sources.BadRow):
      listed.add(os.path.normpath(sources.image_path(source[row])))
  unlisted = [
    name
    for name in names
    if os.path.normpath(os.path.join(folder, name)) not in listed
  ]
  if unlisted:
    sources.warn_once(
      f"{folder}: {len(unlisted)} of its {len(names)} images are not in "
      f"{os.path.basename(table)}, so they are not used, such as {unlisted[0]}"
    )


def listing(
  folder: str,
  endings: Sequence[str] = transforms.ENDINGS,
  also: Sequence[str] = (),
) -> list[str]:
  """Returns the files of a folder and its subfolders, sorted by path.

  Paths are relative to the folder. Hidden files and folders are skipped; links
  are followed, but each folder is listed once. Folders that cannot be read are
  skipped, with a warning. Files that are neither listed nor captions are
  counted in the log, by their endings.

  Args:
    endings: endings of the files to list, in lower case.
    also: endings of further files to list.

  Raises:
    ValueError: there is no file with one of `endings`.
  """
  listed, others = [], collections.Counter()
  for name in _walk(folder):
    ending = _ending(name)
    if ending in endings or ending in also:
      listed.append(name)
    elif ending not in _TEXTS and os.path.basename(name).lower() not in (
      _METADATA
    ):
      others[ending] += 1
  if not any(_ending(name) in endings for name in listed):
    others.update(_ending(name) for name in listed)
    what = "videos" if endings is VIDEOS else "images"
    raise ValueError(
      f"{folder}: expected {what} in it or in its subfolders, found files "
      f"with the endings: {_counts(others) or 'no files'}. Supported endings "
      f"are {' '.join(endings)}; hidden files are skipped."
    )
  if others:
    sources.warn_once(f"{folder}: files that are not used: {_counts(others)}")
  return sorted(listed)


def _counts(endings: collections.Counter[str]) -> str:
  """Numbers of the commonest endings."""
  common = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
  return ", ".join(
    f"{number} {ending or 'without ending'}"
    for ending, number in common[:_MAX_ENDINGS]
  )


def _walk(root: str) -> Iterator[str]:
  """Yields the paths of files, relative to the folder."""
  unreadable: list[str] = []

  def fail(folder: str, error: OSError) -> None:
    if not folder or rejects.hits_all(error):
      raise error
    unreadable.append(f"{folder}: {error.strerror}")

  for folder, names in trees.walk(root, fail):
    for name in names:
      yield os.path.join(folder, name)
  if unreadable:
    sources.warn_once(
      f"{root}: subfolders that cannot be read, so their files are not used: "
      f"{len(unreadable)}, such as {unreadable[0]:.200}"
    )


def is_image(path: str) -> bool:
  return _ending(path) in transforms.ENDINGS


def _ending(path: str) -> str:
  return os.path.splitext(path)[1].lower()


def _is_text(path: str) -> bool:
  return _ending(path) in _TEXTS


def _by_preference(endings: Collection[str]) -> list[str]:
  lower = lambda ending: ending.lower()
  return sorted(endings, key=lambda e: (_TEXTS.index(lower(e)), lower(e) != e))


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
