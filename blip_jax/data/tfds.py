"""Splits that TensorFlow Datasets prepared, read without TensorFlow."""

from typing import Any

from blip_jax.data import cells, kept_columns, schema, sources
from blip_jax.runtime import files

_IMAGE_IDS = ("image_id", "image/id", "image/filename")  # first match wins


class Tfds(sources.Source):
  """A split of a TFDS builder in ArrayRecord format, without TensorFlow.

  Args:
    name: a builder's name ("coco_captions/2014:1.1.0") or the directory of a
      prepared one.
    split: as in TFDS, slices included: "train[:10%]".
    with_captions: whether records have a caption, which needs its feature.
    image: the image feature. TFDS does not decode it: `transforms.decode`
      does, as for all sources.
    caption: the caption feature, text or a sequence of texts; None: the first
      of the usual names.
    keep: further features; the record gets each under its own name, with the
      value that TFDS gives (undecoded bytes for text).
    data_dir: the folder of TFDS's prepared data.

  Raises:
    ValueError: on opening, if the builder is not prepared or lacks a feature.
  """

  def __init__(
    self,
    name: str,
    split: str,
    with_captions: bool = True,
    *,
    image: str = "image",
    caption: str | None = None,
    keep: tuple[str, ...] = (),
    data_dir: str | None = None,
  ):
    # Takes seconds to import, which only those who read TFDS should pay.
    import tensorflow_datasets as tfds

    self._label = f"{name}/{split}"
    builder: Any  # its stubs lack what is used here
    if files.is_folder(name):
      builder = tfds.builder_from_directory(name)
    else:
      builder = tfds.builder(name, data_dir=data_dir)
    if not builder.info.splits:
      raise ValueError(
        f"tfds {name}: not prepared in {builder.data_dir}. Run "
        "builder.download_and_prepare(file_format='array_record') first."
      )
    features = sorted(builder.info.features)
    usual = [key for key in schema.CAPTIONS if key in features]
    self._caption = caption or next(iter(usual), "caption")
    self._with_captions = with_captions
    self._image = image
    needed = (image, self._caption) if with_captions else (image,)
    for key in needed:
      if key not in features:
        raise ValueError(f"tfds {name}: no feature {key!r} in {features}.")
    self._keep = kept_columns.names(keep)
    kept_columns.check(self._keep, features, f"tfds {name}")
    ids = [key for key in _IMAGE_IDS if key in features]
    self._image_id = ids[0] if ids else None
    self._rows = builder.as_data_source(
      split=split, decoders={image: tfds.decode.SkipDecoding()}
    )

  def __len__(self) -> int:
    return len(self._rows)

  def _id(self, index: int) -> str:
    return f"{self._label}:{index}"

  def _record(self, index: int, id: str) -> sources.Record:
    row = self._rows[index]
    record = {"image": row[self._image], "id": id}
    if self._with_captions:
      record["caption"] = self._captions(row, id)
    if self._image_id:
      where = f"tfds {id}: {self._image_id!r}"
      image_id = cells.image_id(row[self._image_id], id, where)
      if image_id is not None:
        record["image_id"] = image_id
    return record | kept_columns.values(self._keep, row, id, f"tfds {id}")

  def _captions(self, row: dict[str, Any], id: str) -> Any:
    caption = row[self._caption]
    if isinstance(caption, dict):  # coco_captions: {"id": [...], "text": [...]}
      caption = caption["text"]
    return cells.caption(caption, id, f"tfds {id}: {self._caption!r}")
