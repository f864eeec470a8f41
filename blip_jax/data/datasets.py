"""From a line in a config to a source, and from a record to model inputs."""

import ast
import glob
import inspect
import itertools
import os
import re
import urllib.parse
from collections.abc import Callable
from typing import Any

from blip_jax.data import (
  folders,
  scenes,
  shards,
  sources,
  tables,
  tfds,
)

UNDERSTOOD = """
  path/annotations.json    a list of {image | url, caption, image_id?}
  path/annotations.jsonl   the same, one object per line
  path/table.csv           the same, below a header line; .tsv has tabs;
                           ?delimiter=CHARACTER
  path/*.parquet           the same; a picture may be a path, a URL or bytes
  path/folder              pictures with captions beside them (a.jpg, a.txt),
                           or in the folder's metadata.csv or metadata.jsonl
                           (file_name, caption | text)
  path/*.tar               webdataset or img2dataset shards
  path/{00000..00099}.tar  the same, all of which must exist
  tfds:NAME:SPLIT          a TFDS builder, or the directory of a prepared one;
                           ?caption=FEATURE&image=FEATURE&data_dir=PATH
  scenes:SPLIT             rendered scenes: train, val or test;
                           ?noise=0.3&num=100
  Behind annotations and tables ?image=COLUMN&caption=COLUMN names columns."""

UNDERSTOOD_IMAGES = f"""
  path/folder              all pictures in it and in its subfolders
  path/picture.jpg         one of them
  path/**/*.{{jpg,png}}      those whose names match{UNDERSTOOD}"""


def open_source(spec: str, image_root: str = "") -> Any:
  """Return the source that `spec` names; see `UNDERSTOOD`.

  Args:
    spec: one of the forms of `UNDERSTOOD`. What follows "?" becomes keyword
      arguments.
    image_root: what relative paths of pictures in annotations start from.

  Raises:
    ValueError: nothing of the kind is understood, or it does not exist.
  """
  source = _open(spec, image_root, with_captions=True)
  if source is None:
    raise ValueError(
      f"Unknown data source {spec!r}: no folder, and no ending that is "
      f"understood. Understood: {UNDERSTOOD}"
    )
  return source


def open_images(spec: str, image_root: str = "") -> Any:
  """Return a source of pictures that nobody needs to have described.

  Its records are as those of `open_source`, without `caption`. The ids of
  files are their paths, from the folder that they share. A picture of several
  rows comes as often.

  Args:
    spec: one of the forms of `UNDERSTOOD_IMAGES`.
    image_root: what relative paths of pictures in annotations start from.

  Raises:
    ValueError: nothing of the kind is understood, or there are no pictures.
  """
  folder, query = _split_query(spec)
  if os.path.isdir(folder):
    options = _options(query, folders.Images)
    return folders.Images(folder, folders.listing(folder), **options)
  source = _open(spec, image_root, with_captions=False)
  if source is not None:
    return source
  paths = sorted(path for path in expand(spec) if folders.is_image(path))
  if not paths:
    raise ValueError(
      f"No pictures in {spec!r}. Understood: {UNDERSTOOD_IMAGES}"
    )
  sources.existing(paths, "pictures")
  root = sources.shared_folder(paths)
  return folders.Images(root, [path.removeprefix(root) for path in paths])


def open_videos(spec: str, image_root: str = "") -> Any:
  """Return a source whose pictures are videos: those of a folder, or of an
  annotation or a table; see `open_images`."""
  if os.path.isdir(spec):
    return folders.Images(spec, folders.listing(spec, folders.VIDEOS))
  return open_images(spec, image_root)


def _open(spec: str, image_root: str, with_captions: bool) -> Any:
  """Open what has rows of its own; None if `spec` names no such thing."""
  kind, _, rest = spec.partition(":")
  if kind == "scenes":
    split, query = _split_query(rest)
    options = _options(query, scenes.Scenes)
    return scenes.Scenes(split, with_captions=with_captions, **options)
  if kind == "tfds":
    address, query = _split_query(rest)
    name, _, split = address.rpartition(":")
    if not name:
      raise ValueError(f"{spec!r}: expected tfds:NAME:SPLIT.")
    options = _options(query, tfds.Tfds)
    return tfds.Tfds(name, split, with_captions=with_captions, **options)
  path, query = _split_query(spec)
  if os.path.isdir(path):
    return _open_folder(path, query)
  given = {"image_root": image_root, "with_captions": with_captions}
  match os.path.splitext(path)[1].lower():
    case ".json" | ".jsonl":
      given |= _options(query, sources.Annotations)
      return sources.Annotations(path, **given)
    case ".csv" | ".tsv":
      return tables.Csv(path, **given, **_options(query, tables.Csv))
    case ".parquet":
      # Needs an extra of the package.
      from blip_jax.data import parquet

      given |= _options(query, parquet.Parquet)
      return parquet.Parquet(expand(path), **given)
    case ".tar":
      options = _options(query, shards.TarShards)
      return shards.TarShards(expand(path), with_captions, **options)
  return None


def _open_folder(folder: str, query: str) -> Any:
  table = folders.metadata(folder)
  if table:
    return open_source(f"{table}?{query}" if query else table, folder)
  options = _options(query, folders.CaptionedImages)
  return folders.CaptionedImages(folder, **options)


def open_rotation(pattern: str, image_root: str = "") -> list[Any]:
  """Return the sources of which each epoch uses the next one.

  The paper splits LAION so. The order is that of the sorted names, the same
  on every host: BLIP lists the folder unsorted, and hosts may disagree.
  """
  path, query = _split_query(pattern)
  suffix = f"?{query}" if query else ""
  return [open_source(path + suffix, image_root) for path in expand(path)]


def shard_specs(spec: str) -> list[str]:
  """The specs of the files that `spec` is made of, each a source of its own.

  Tar shards and Parquet files are; of anything else there are none.
  """
  path, query = _split_query(spec)
  if os.path.splitext(path)[1].lower() not in (".tar", ".parquet"):
    return []
  suffix = f"?{query}" if query else ""
  return [found + suffix for found in expand(path)]


def path_of(spec: str) -> str:
  """What stands in a spec before its options: of one file, its path."""
  return _split_query(spec)[0]


def expand(pattern: str) -> list[str]:
  """Return the paths that a pattern with {a,b}, {00..99}, * or ** stands for.

  A path that several parts of the pattern name comes once.

  Raises:
    ValueError: a pattern with `*`, `?` or `[` matches no file.
  """
  paths = []
  for path in _braces(pattern):
    found = [path]
    if glob.has_magic(path):
      found = sorted(glob.glob(path, recursive=True))
    if not found:
      raise ValueError(f"{path}: no such files.")
    paths.extend(found)
  return list(dict.fromkeys(paths))


def _braces(pattern: str) -> list[str]:
  pieces = re.split(r"\{([^{}]*)\}", pattern)
  # Text and contents of braces take turns.
  choices = [_choices(p) if i % 2 else [p] for i, p in enumerate(pieces)]
  return ["".join(path) for path in itertools.product(*choices)]


def _choices(braces: str) -> list[str]:
  numbers = re.fullmatch(r"(\d+)\.\.(\d+)", braces)
  if not numbers:
    return braces.split(",")
  first, last = numbers.groups()
  return [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]


def _split_query(spec: str) -> tuple[str, str]:
  """Split "address?key=value&..."; in a pattern "?" stands for a letter."""
  address, _, query = spec.rpartition("?")
  return (address, query) if "=" in query else (spec, "")


# Arguments of sources that are not for a spec to set.
_OURS = ("image_root", "with_captions")


def _options(query: str, target: Callable) -> dict[str, Any]:
  """Parse "key=value&..."; keys must be options of `target`."""
  parameters = {
    name: parameter
    for name, parameter in inspect.signature(target).parameters.items()
    if parameter.default is not parameter.empty and name not in _OURS
  }
  options = {}
  for key, value in urllib.parse.parse_qsl(query, strict_parsing=bool(query)):
    if key not in parameters:
      raise ValueError(
        f"?{query}: no option {key!r}; there are {list(parameters)}."
      )
    is_text = parameters[key].annotation in (str, str | None)
    options[key] = value if is_text else _literal(value)
  return options


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):  # a word: the value is the text itself
    return text
