"""From a source's spec, a line in a config, to the source."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from blip_jax.data import (
  annotations,
  dialog_files,
  folders,
  json_datasets,
  json_index,
  kept_columns,
  question_files,
  scenes,
  shards,
  sources,
  specs,
  tables,
  tfds,
  token_file,
)
from blip_jax.runtime import files

UNDERSTOOD = """
  path/annotations.json    a list of {image | url, caption, image_id?}
  path/annotations.jsonl   the same, one object per line
  path/captions_val.json   COCO's official file: {images, annotations}
  path/dataset_coco.json   Karpathy's whole file; ?split=train,restval
  path/results.token       Flickr8k's and Flickr30k's captions
  path/table.csv           the same, after a header line; .tsv has tabs;
                           ?delimiter=CHARACTER, and ?columns=caption,url for
                           a table without a header line
  path/*.parquet           the same; an image may be a path, a URL or bytes
  path/folder              images with captions next to them (a.jpg, a.txt),
                           or in the folder's metadata.csv or metadata.jsonl
                           (file_name, caption | text)
  path/*.tar               webdataset or img2dataset shards
  path/{00000..00099}.tar  the same, all of which must exist
  tfds:NAME:SPLIT          a TFDS builder, or the directory of a prepared one;
                           ?caption=FEATURE&image=FEATURE&data_dir=PATH
  scenes:SPLIT             rendered scenes: train, val or test;
                           ?noise=0.3&num=100
  After annotations and tables ?image=COLUMN&caption=COLUMN selects columns.
  After any of these ?keep=COLUMN,COLUMN keeps further columns in the records:
  keys of annotations, columns of tables, features of TFDS, in tar shards the
  texts of members with that ending or keys of their json."""

UNDERSTOOD_IMAGES = f"""
  path/folder              all images in it and in its subfolders
  path/image.jpg           a single image
  path/**/*.{{jpg,png}}      the images whose paths match{UNDERSTOOD}"""


def open_source(
  spec: str, image_root: str = "", keep: Sequence[str] = ()
) -> Any:
  """Returns the source that `spec` describes; see `UNDERSTOOD`.

  Args:
    spec: one of the forms of `UNDERSTOOD`. What follows "?" becomes keyword
      arguments.
    image_root: folder that relative image paths in annotations start from.
    keep: further columns; records get each under its own name. Those that
      `spec` names are added.

  Raises:
    ValueError: the form is not supported, the source does not exist, or it
      lacks a column to keep.
  """
  return _known(spec, _open(spec, image_root, keep, with_captions=True))


def open_references(spec: str) -> Any:
  """Returns a source of captions whose images nobody will read.

  It is that of `open_source`, but JSON and tables may name images by `image_id`
  alone; such a record has no `image`.

  Args:
    spec: one of the forms of `UNDERSTOOD`.

  Raises:
    ValueError: as for `open_source`.
  """
  source = _open(spec, "", (), with_captions=True, needs_image=False)
  return _known(spec, source)


def open_questions(spec: str, image_root: str = "") -> Any:
  """Returns a source of questions about images; see `questions`.

  Args:
    spec: JSON, JSON lines, CSV or TSV with the columns `image`, `question` and,
      unless they are only to be answered, `answer`; the official files of VQA,
      with their annotations next to them, and of GQA; or rendered scenes.
      `?image_file=train2017/{image_id:012}.jpg` says where images are that rows
      name by their id.
    image_root: folder that relative image paths start from.

  Raises:
    ValueError: the form is not supported, the source does not exist, or it has
      no questions.
  """
  kind, _, rest = spec.partition(":")
  if kind == "scenes":
    split, query = specs.split_query(rest)
    options = specs.options(query, scenes.Scenes)
    return scenes.Scenes(
      split, with_captions=False, with_questions=True, **options
    )
  return _open_texts(spec, image_root, "questions", _question_rows)


def open_statements(spec: str, image_root: str = "") -> Any:
  """Returns a source of statements about two images; see `statements`.

  Args:
    spec: JSON, JSON lines, CSV or TSV with the columns `sentence`, `label`, if
      the truth is known, and `image_0` and `image_1`, or `images`, a list of
      two; the official files of NLVR2; or pairs of rendered scenes.
    image_root: folder that relative image paths start from.

  Raises:
    ValueError: the form is not supported, the source does not exist, or it has
      no statements about two images.
  """
  kind, _, rest = spec.partition(":")
  if kind == "scenes":
    split, query = specs.split_query(rest)
    return scenes.Statements(split, **specs.options(query, scenes.Statements))
  return _open_texts(spec, image_root, "statements", _table_rows)


def open_dialogs(spec: str, image_root: str = "") -> Any:
  """Returns a source of dialogs about images; see `dialogs`.

  Args:
    spec: JSON or JSON lines with the columns `image`, `caption` and `dialog`;
      the official files of VisDial, with their dense annotations next to them;
      or dialogs about rendered scenes. `?image_file=coco/{image_id:012}.jpg`
      says where images are that rows name by their id.
    image_root: folder that relative image paths start from.

  Raises:
    ValueError: the form is not supported, the source does not exist, or it has
      no dialogs.
  """
  kind, _, rest = spec.partition(":")
  if kind == "scenes":
    split, query = specs.split_query(rest)
    return scenes.Dialogs(split, **specs.options(query, scenes.Dialogs))
  return _open_texts(spec, image_root, "dialogs", _dialog_rows)


def _open_texts(
  spec: str,
  image_root: str,
  what: str,
  rows_of: Callable[[str], Callable | None],
) -> Any:
  """Opens a source of "questions", "statements" or "dialogs", as `what` says.

  Args:
    rows_of: path -> the class that reads such a file; None if there is none.
  """
  path, query = specs.split_query(spec)
  if files.is_folder(path) and (table := folders.metadata(path)):
    path, image_root = table, path
  rows = rows_of(path)
  if rows is None:
    tables_too = "" if rows_of is _dialog_rows else ", .csv, .tsv"
    raise ValueError(
      f"{spec!r}: expected {what} in a .json, .jsonl{tables_too}, in a folder "
      "with such a metadata file, or scenes:SPLIT, found another kind of "
      f"source.{_advice(spec)}"
    )
  return rows(
    path,
    image_root=image_root,
    with_captions=False,
    **{f"with_{what}": True},
    **specs.options(query, rows),
  )


def _question_rows(path: str) -> Callable | None:
  """The class that reads the questions of a file, by its name."""
  is_json = path.lower().endswith(".json") and files.is_file(path)
  if is_json and json_index.is_object(path):
    return question_files.QuestionFiles
  return _table_rows(path)


def _dialog_rows(path: str) -> Callable | None:
  """The class that reads the dialogs of a file, by its name."""
  is_json = path.lower().endswith(".json") and files.is_file(path)
  if is_json and json_index.is_object(path):
    return dialog_files.DialogFiles
  rows = _table_rows(path)
  return None if rows is tables.Csv else rows


def _table_rows(path: str) -> Callable | None:
  """The class that reads the rows of a list or a table, by its name."""
  match os.path.splitext(path)[1].lower():
    case ".json" | ".jsonl":
      return annotations.Annotations
    case ".csv" | ".tsv":
      return tables.Csv
  return None


def _known(spec: str, source: Any) -> Any:
  if source is None:
    raise ValueError(
      f"Unknown data source {spec!r}: not a folder, and its ending is not "
      f"supported.{_advice(spec)} Understood: {UNDERSTOOD}"
    )
  return source


def open_images(
  spec: str, image_root: str = "", keep: Sequence[str] = ()
) -> Any:
  """Returns a source of images, with or without captions.

  Its records are those of `open_source` without `caption`. The ids of image
  files are their paths, relative to the folder that they share. An image that
  several rows name occurs once for each row.

  Args:
    spec: one of the forms of `UNDERSTOOD_IMAGES`.
    image_root: folder that relative image paths in annotations start from.
    keep: as in `open_source`. If a folder is opened with it, the rows are
      those of the folder's table, since other images have no columns.

  Raises:
    ValueError: as for `open_source`, or there are no images.
  """
  path, query = specs.split_query(spec)
  if files.is_folder(path):
    if specs.all_kept(query, keep):
      return _open_folder(path, query, keep, with_captions=False)
    options = specs.options(query, folders.Images)
    return folders.Images(path, folders.listing(path), **options)
  source = _open(spec, image_root, keep, with_captions=False)
  if source is not None:
    return source
  expanded = specs.expand(spec)
  paths = sorted(path for path in expanded if folders.is_image(path))
  if not paths:
    there = any(map(files.exists, expanded))
    raise ValueError(
      f"No images in {spec!r}{'' if there else ': it does not exist'}."
      f"{_advice(spec)} Understood: {UNDERSTOOD_IMAGES}"
    )
  sources.existing(paths, "images")
  _refuse_kept(spec, keep)
  root = sources.shared_folder(paths)
  return folders.Images(root, [path.removeprefix(root) for path in paths])


def _advice(spec: str) -> str:
  """Returns what helps where a spec describes no source, or ""."""
  if (
    specs.path_of(spec).lower().endswith((".gz", ".bz2", ".xz", ".zst", ".zip"))
  ):
    return " Decompress it first: rows are read one by one, in any order."
  return ""


def open_videos(
  spec: str, image_root: str = "", keep: Sequence[str] = ()
) -> Any:
  """Returns a source whose images are paths of videos; see `open_images`.

  They are the videos of a folder, or those that annotations or a table name.
  """
  if files.is_folder(spec) and not keep:
    return folders.Images(spec, folders.listing(spec, folders.VIDEOS))
  return open_images(spec, image_root, keep)


def _open(
  spec: str,
  image_root: str,
  keep: Sequence[str],
  with_captions: bool,
  needs_image: bool = True,
) -> Any:
  """Opens a source of records; None if `spec` does not describe one."""
  kind, _, rest = spec.partition(":")
  if kind == "scenes":
    return _open_scenes(rest, keep, with_captions)
  if kind == "tfds":
    address, query = specs.split_query(rest)
    name, _, split = address.rpartition(":")
    if not name:
      raise ValueError(f"{spec!r}: expected tfds:NAME:SPLIT.")
    options = specs.options(query, tfds.Tfds, keep)
    return tfds.Tfds(name, split, with_captions=with_captions, **options)
  path, query = specs.split_query(spec)
  if files.is_folder(path):
    return _open_folder(path, query, keep, with_captions)
  return _open_rows(path, query, image_root, keep, with_captions, needs_image)


def _open_rows(
  path: str,
  query: str,
  image_root: str,
  keep: Sequence[str],
  with_captions: bool,
  needs_image: bool = True,
) -> Any:
  """Opens annotations, tables or shards; None if `path` is none of them."""
  given: dict[str, Any] = {
    "image_root": image_root,
    "with_captions": with_captions,
  }
  if path.lower().endswith((".token", ".token.txt")):
    given |= specs.options(query, token_file.TokenFile, keep)
    return token_file.TokenFile(path, **given)
  match os.path.splitext(path)[1].lower():
    case ".json" if files.is_file(path) and json_index.is_object(path):
      given |= specs.options(query, json_datasets.JsonDataset, keep)
      given |= {"needs_image": needs_image}
      return json_datasets.JsonDataset(path, **given)
    case ".json" | ".jsonl":
      given |= specs.options(query, annotations.Annotations, keep)
      given |= {"needs_image": needs_image}
      return annotations.Annotations(path, **given)
    case ".csv" | ".tsv":
      given |= specs.options(query, tables.Csv, keep)
      return tables.Csv(path, **given, needs_image=needs_image)
    case ".parquet":
      # Needs an extra of the package.
      from blip_jax.data import parquet

      given |= specs.options(query, parquet.Parquet, keep)
      return parquet.Parquet(
        specs.expand(path), **given, needs_image=needs_image
      )
    case ".tar":
      options = specs.options(query, shards.TarShards, keep)
      return shards.TarShards(specs.expand(path), with_captions, **options)
  return None


def _open_scenes(
  address: str, keep: Sequence[str], with_captions: bool
) -> scenes.Scenes:
  split, query = specs.split_query(address)
  kept = kept_columns.names(specs.all_kept(query, keep))
  options = specs.options(specs.without_keep(query), scenes.Scenes)
  source = scenes.Scenes(split, with_captions=with_captions, **options)
  if kept:  # records have these keys with and without `keep`
    kept_columns.check(kept, source[0].keys(), f"scenes:{split}")
  return source


def _open_folder(
  folder: str, query: str, keep: Sequence[str], with_captions: bool
) -> Any:
  table = folders.metadata(folder)
  if table:
    images = _open_rows(table, query, folder, keep, with_captions=False)
    folders.warn_of_unlisted(folder, table, images)
    return _open_rows(table, query, folder, keep, with_captions)
  _refuse_kept(folder, specs.all_kept(query, keep))
  options = specs.options(query, folders.CaptionedImages)
  return folders.CaptionedImages(folder, **options)


def _refuse_kept(where: str, keep: Sequence[str]) -> None:
  if keep:
    raise ValueError(
      f"{where}: expected columns to keep {list(keep)}, found only files. A "
      "table in the folder (metadata.csv with the column file_name) can have "
      "columns."
    )


def open_rotation(
  pattern: str, image_root: str = "", keep: Sequence[str] = ()
) -> list[Any]:
  """Returns the sources that epochs use in turn, one per epoch.

  The paper splits LAION this way. The order is that of the sorted names, the
  same on every host: BLIP lists the folder unsorted, so hosts may disagree.
  """
  path, query = specs.split_query(pattern)
  suffix = f"?{query}" if query else ""
  return [open_source(p + suffix, image_root, keep) for p in specs.expand(path)]
