"""Statements about two images, from the rows of files.

The record of a row has, instead of one image,

  images        two, the left one first, each as a record's `image`
  statement     text
  label         whether the statement is true; absent if the file does not say
  statement_id  how the file identifies it; the record's id if it does not
  group         what all pairs that share the statement have in common
"""

import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from blip_jax.data import sources, transforms

# The first name that a row has wins.
STATEMENTS = ("sentence", "statement")
IMAGES = "images"
PAIR = ("image_0", "image_1")
# NLVR2: "split-set-pair-sentence", and for training the folder of the images.
IDENTIFIER = "identifier"
_DIRECTORY = "directory"
_LABEL = "label"
_TRUE, _FALSE = ("true", "1", "1.0"), ("false", "0", "0.0")
_NLVR2 = re.compile(r"(([a-z]+\d?-\d+)-\d+)-(\d+)")


def check(columns: Collection[str], where: str) -> None:
  """Raises `ValueError` unless there are columns of statements and images."""
  if not any(name in columns for name in STATEMENTS):
    raise ValueError(
      f"{where}: expected text under {STATEMENTS[0]!r}, found "
      f"{list(columns)!r:.200}"
    )
  has_pair = all(name in columns for name in PAIR)
  if not (has_pair or IMAGES in columns or IDENTIFIER in columns):
    raise ValueError(
      f"{where}: expected two images, under {PAIR[0]!r} and {PAIR[1]!r}, or "
      f"listed under {IMAGES!r}, found {list(columns)!r:.200}"
    )


def record(row: Mapping[str, Any], id: str, where: str) -> sources.Record:
  """Returns what a record has of the row's statement, without the images.

  Raises:
    BadRow: there is no statement, or a label that is neither true nor false.
  """
  name = next((name for name in STATEMENTS if row.get(name)), STATEMENTS[0])
  statement = row.get(name)
  if not isinstance(statement, str) or not statement.strip():
    detail = f"{where}: expected a statement, found {statement!r:.200}"
    raise sources.BadRow(id, "missing_statement", detail)
  identifier = sources.first_id(row, [IDENTIFIER])
  values: sources.Record = {
    "statement": statement,
    "statement_id": id if identifier is None else str(identifier),
    "group": _group(identifier, statement),
  }
  label = row.get(_LABEL)
  if label is not None and label != "":
    values["label"] = _truth(label, id, where)
  return values


def images(
  row: Mapping[str, Any], id: str, where: str
) -> list[tuple[str, Any]]:
  """Returns where a row has each of its two images, and what is there.

  Rows of NLVR2 do not name files; theirs are "set-pair-img0.png" and
  "set-pair-img1.png", in the row's `directory` if it has one.

  Raises:
    BadRow: the row lists more or fewer images.
  """
  listed = row.get(IMAGES)
  if isinstance(listed, (list, tuple)):
    if len(listed) != len(PAIR):
      detail = f"{where}: {IMAGES!r}: expected 2 images, found {len(listed)}"
      raise sources.BadRow(id, "missing_image", detail)
    return [(f"{IMAGES}[{n}]", image) for n, image in enumerate(listed)]
  match = _NLVR2.fullmatch(str(row.get(IDENTIFIER, "")))
  if match and not any(row.get(name) for name in PAIR):
    folder = str(row.get(_DIRECTORY, ""))
    names = [f"{match[1]}-img{n}.png" for n in range(len(PAIR))]
    return [(IDENTIFIER, os.path.join(folder, name)) for name in names]
  return [(name, row.get(name)) for name in PAIR]


def cleaned(statement: str, max_words: int) -> str:
  """Returns a statement as a model reads it; see `transforms.pre_caption`.

  Raises:
    BadSample: it is not UTF-8, is too long, or has no words.
  """
  return transforms.pre_caption(transforms.clean_text(statement), max_words)


def mirrored(statement: str) -> str:
  """Returns a cleaned statement about the same two images in other places:
  the words "left" and "right" are exchanged."""
  other = {"left": "right", "right": "left"}
  return " ".join(other.get(word, word) for word in statement.split(" "))


def _group(identifier: Any, statement: str) -> str:
  """The set of images and the number of the statement about it, as NLVR2's
  program groups rows; elsewhere, the text of the statement."""
  match = _NLVR2.fullmatch(str(identifier))
  return f"{match[2]}-{match[3]}" if match else statement


def _truth(label: Any, id: str, where: str) -> bool:
  """Whether a label, such as "True", "false", 1 or False, says true."""
  said = str(label).strip().lower()
  if said not in (*_TRUE, *_FALSE):
    detail = (
      f"{where}: {_LABEL!r}: expected true or false, found {label!r:.200}"
    )
    raise sources.BadRow(id, "broken_row", detail)
  return said in _TRUE
