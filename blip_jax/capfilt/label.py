"""Labelling of work units: synthetic captions and filter scores.

The captioner generates captions for each image, and the filter scores every
text of the image, web and synthetic. Each model encodes an image once.

Dimensions: I images of a device batch; H, W image.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from blip_jax.data import image_readers, sources, transforms
from blip_jax.inference import captioning, matching
from blip_jax.inference import model as model_lib
from blip_jax.runtime import ahead, sharding

# Batches that are read while the models work on others.
_BATCHES_AHEAD = 2
# Batches of a work unit that are left when the next one is opened, so that the
# models need not wait for it.
_OPENED_AHEAD = 8
# A text that cannot be used is recorded up to here, to show what it was.
_MAX_BAD_TEXT = 200
# Web texts of a row that are scored; of the others only the reason is recorded.
MAX_TEXTS = 1_000
WEB, SYNTHETIC = "web", "synthetic"
SCORES = ("itm_prob", "itc_cosine", "log_prob")
BAD_SCORE = "bad_score"  # NaN or infinite


@dataclasses.dataclass(frozen=True)
class Text:
  """A text of an image, with its scores.

  Attributes:
    text: a web text as the collection has it, or a generated caption.
    source: WEB or SYNTHETIC.
    bad: why it cannot be used, in which case the filter skips it; else "". A
      text with a score that is NaN or infinite is one of BAD_SCORE, and has no
      scores.
    itm_prob: the filter's probability that text and image match; None before
      it is scored.
    itc_cosine: cosine of the text and image features; None before it is scored.
    log_prob: log probability of a synthetic text given the image; None for
      web texts.
  """

  text: str
  source: str
  bad: str = ""
  itm_prob: float | None = None
  itc_cosine: float | None = None
  log_prob: float | None = None

  def __post_init__(self):
    if not are_finite(self.itm_prob, self.itc_cosine, self.log_prob):
      changes = dict.fromkeys(SCORES) | {"bad": self.bad or BAD_SCORE}
      for name, value in changes.items():
        object.__setattr__(self, name, value)  # as it is frozen


def are_finite(*scores: float | None) -> bool:
  """Whether all scores that are there are finite numbers."""
  return all(score is None or math.isfinite(score) for score in scores)


@dataclasses.dataclass(frozen=True)
class LabelledImage:
  """An image of a work unit and its texts.

  Attributes:
    row: its index in the source of the work unit.
    key: id of its record; seeds the sampling of its captions.
    path: its file; "" if it is stored in a shard or a table.
    image_id: its name in the annotations, or None.
    bad: why it cannot be used; "" if it can.
    texts: web texts first, then synthetic ones.
  """

  row: int
  key: str
  path: str = ""
  image_id: str | None = None
  bad: str = ""
  texts: tuple[Text, ...] = ()


# A work unit, in whatever form the caller knows it again, and its open rows.
Opened = tuple[Any, sources.Rows]


@dataclasses.dataclass(frozen=True)
class Batch:
  """The images of one device batch.

  Attributes:
    work_unit: theirs.
    images: None where the last batch of a work unit is padded; empty if it has
      no rows.
    pixels: name of the model -> the images at its size.
    is_last: whether the work unit has no further batch.
  """

  work_unit: Any
  images: tuple[LabelledImage | None, ...]
  pixels: dict[str, UInt8[np.ndarray, "I H W 3"]]
  is_last: bool

  @property
  def labelled(self) -> list[LabelledImage]:
    """The images without the padding."""
    return [image for image in self.images if image is not None]


class Labeller:
  """Captioner and filter of a job on the devices of this process.

  The result depends only on the work unit, the settings and the seed: batches
  never span work units and always have the same number of images. But work
  units follow each other without a pause. `close` ends threads and processes.

  Args:
    captioner: generates synthetic captions; None: there are none.
    filter_model: scores image-text pairs.
    seed: of the sampled captions, together with the key of the image.
    per_device_batch_size: images per device and batch.
    generation: decoding options; see `model_lib.Model.caption`.
    prompt: prefix of the captions; None: the captioner's own.
    num_threads: threads that read records, and images if there are no workers.
    num_workers: processes that read images.
    scaled_jpeg: whether large JPEGs are decoded at a fraction of their size.
  """

  def __init__(
    self,
    captioner: model_lib.Model | None,
    filter_model: model_lib.Model,
    *,
    seed: int,
    per_device_batch_size: int,
    generation: dict[str, Any],
    prompt: str | None = None,
    num_threads: int = 8,
    num_workers: int = 0,
    scaled_jpeg: bool = False,
  ):
    self._filter_model = filter_model
    self._captioner = captioner and captioner.captioner(prompt, **generation)
    self._transforms = {"filter": filter_model.image}
    if captioner is not None:
      self._transforms["captioner"] = captioner.image
    self._seed = seed
    self._batch_size = per_device_batch_size * sharding.num_data_shards(
      filter_model.mesh
    )
    # Models with the same image size share the pixels.
    self._sizes = [*dict.fromkeys(self._transforms.values())]
    self.readers = image_readers.ImageReaders(
      self._sizes, scaled_jpeg, num_workers
    )
    # While a process decodes, its thread waits.
    self._threads = concurrent.futures.ThreadPoolExecutor(
      num_threads + num_workers
    )

  def close(self) -> None:
    self.readers.close()
    self._threads.shutdown(cancel_futures=True)

  def __call__(
    self, work_units: Iterable[Opened]
  ) -> Generator[Batch, None, None]:
    """Yields the labelled batches of work units, in order."""
    with contextlib.closing(self.read(work_units)) as batches:
      yield from self.label(batches)

  def label(self, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Runs the models on batches that `read` returned.

    While the captions of a batch are awaited, the devices also have those of
    the next one to generate, and texts of the one before to score.
    """
    for start in (self._start_captions, self._start_scores):
      batches = ahead.started_ahead(start, batches, 1)
    return batches

  def read(self, work_units: Iterable[Opened]) -> Generator[Batch, None, None]:
    """Yields the images and web texts of work units, unscored.

    `work_units` is iterated in a thread, as late as models need not wait.
    """
    work_units = iter(work_units)
    with concurrent.futures.ThreadPoolExecutor(1) as opener:
      parts = _parts(work_units, self._batch_size, opener)
      yield from ahead.started_ahead(self._start_reading, parts, _BATCHES_AHEAD)

  def _start_reading(self, part: "_Part") -> Callable[[], Batch]:
    arrays = {
      size: np.empty(
        (self._batch_size, *np.broadcast_to(size.size, 2), 3), np.uint8
      )
      for size in self._sizes
    }
    images = [
      self._threads.submit(
        self._read, part.source, row, [x[place] for x in arrays.values()]
      )
      for place, row in enumerate(part.rows)
    ]
    num_padded = self._batch_size - len(part.rows)
    for array in arrays.values():
      array[len(part.rows) :] = 0

    def finish() -> Batch:
      return Batch(
        part.work_unit,
        (*(image.result() for image in images), *[None] * num_padded),
        {name: arrays[size] for name, size in self._transforms.items()},
        part.is_last,
      )

    return finish

  def _read(
    self, rows: sources.Rows, row: int, out: list[np.ndarray]
  ) -> LabelledImage:
    """Everything about a row but its scores; its pixels go into `out`."""
    id = f"row {row}"
    try:
      record = rows[row]
      id = record["id"]
      image = _unscored(row, record)
      self.readers.read(record["image"], out)
      return image
    except Exception as error:
      bad = sources.as_bad(id, error)
    for array in out:
      array[...] = 0
    return LabelledImage(row, bad.id, bad=f"{bad.reason}: {bad.detail}")

  def _start_captions(self, batch: Batch) -> Callable[[], Batch]:
    if self._captioner is None or not batch.labelled:
      return lambda: batch
    keys = [image.key if image else "" for image in batch.images]
    captions = self._captioner.start(
      batch.pixels["captioner"], self._seed, [*map(image_seed, keys)]
    )
    return lambda: dataclasses.replace(
      batch,
      images=tuple(
        image and _with_captions(image, caption)
        for image, caption in zip(batch.images, captions(), strict=True)
      ),
    )

  def _start_scores(self, batch: Batch) -> Callable[[], Batch]:
    if not batch.labelled:
      return lambda: batch
    texts = [
      [text.text for text in image.texts if not text.bad] if image else []
      for image in batch.images
    ]
    matches = self._filter_model.matcher.start_score(
      batch.pixels["filter"], texts, self._batch_size
    )
    return lambda: dataclasses.replace(
      batch,
      images=tuple(
        image and _with_scores(image, match)
        for image, match in zip(batch.images, matches(), strict=True)
      ),
    )


@dataclasses.dataclass(frozen=True)
class _Part:
  """The rows of a work unit that become a batch."""

  work_unit: Any
  source: sources.Rows
  rows: range
  is_last: bool


def _parts(
  work_units: Iterator[Opened],
  batch_size: int,
  opener: concurrent.futures.Executor,
) -> Iterator[_Part]:
  """Cuts work units into batches; opens the next one before one is through."""
  following = lambda: opener.submit(next, work_units, None)
  opened = following().result()
  while opened is not None:
    (work_unit, source), upcoming = opened, None
    starts = range(0, max(len(source), 1), batch_size)
    for number, start in enumerate(starts, 1):
      if upcoming is None and len(starts) - number < _OPENED_AHEAD:
        upcoming = following()
      rows = range(start, min(start + batch_size, len(source)))
      yield _Part(work_unit, source, rows, number == len(starts))
    assert upcoming is not None
    opened = upcoming.result()


def image_seed(key: str) -> int:
  """The seed of an image's samples: the first 4 bytes of its key's SHA-256.

  A function of the key alone, so that captions depend neither on the batch nor
  on the process that generates them.
  """
  return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")


def _with_captions(
  image: LabelledImage, caption: captioning.Caption
) -> LabelledImage:
  if image.bad:
    return image
  synthetic = tuple(
    _text(one.text, SYNTHETIC, log_prob=one.log_prob)
    for one in (caption, *caption.others)
  )
  return dataclasses.replace(image, texts=image.texts + synthetic)


def _with_scores(image: LabelledImage, match: matching.Match) -> LabelledImage:
  scores = zip(match.itm_prob, match.itc_cosine, strict=True)
  texts = []
  for text in image.texts:
    if not text.bad:
      prob, cosine = next(scores)
      text = dataclasses.replace(
        text, itm_prob=float(prob), itc_cosine=float(cosine)
      )
    texts.append(text)
  return dataclasses.replace(image, texts=tuple(texts))


def _text(
  text: str | bytes, source: str, log_prob: float | None = None
) -> Text:
  try:
    return Text(transforms.clean_text(text), source, log_prob=log_prob)
  except transforms.BadSample as bad:
    if isinstance(text, bytes):
      text = text.decode(errors="replace")
    text = text.encode(errors="replace").decode()[:_MAX_BAD_TEXT]
    return Text(text, source, bad.reason, log_prob=log_prob)


def _unscored(row: int, record: sources.Record) -> LabelledImage:
  """Everything of a record except its pixels."""
  image_id = record.get("image_id")
  captions = record["caption"]
  texts = [_text(text, WEB) for text in captions[:MAX_TEXTS]]
  texts += [Text("", WEB, "too_many")] * (len(captions) - len(texts))
  if "no_text" in record:
    texts.append(Text("", WEB, record["no_text"]))
  return LabelledImage(
    row,
    record["id"],
    sources.image_path(record),
    None if image_id is None else str(image_id),
    texts=tuple(texts),
  )
