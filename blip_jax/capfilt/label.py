"""Labelling of a work unit: synthetic captions and filter scores.

The captioner generates captions for each image, and the filter scores every
text of the image, web and synthetic. Each model encodes an image once.

Dimensions: I images of a device batch; H, W image.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from blip_jax.data import examples, loader, rejects, sources, transforms
from blip_jax.inference import captioning, matching
from blip_jax.inference import model as model_lib
from blip_jax.runtime import ahead, sharding

# Each of the two models may have one batch running and one waiting.
_NUM_MODEL_THREADS = 4
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


@dataclasses.dataclass(frozen=True)
class Batch:
  """The images of one device batch.

  Attributes:
    images: None where the last batch of a work unit is padded.
    pixels: name of the model -> the images at its size.
  """

  images: tuple[LabelledImage | None, ...]
  pixels: dict[str, UInt8[np.ndarray, "I H W 3"]]


class Labeller:
  """Captioner and filter of a job on the devices of this process.

  The result depends only on the work unit, the settings and the seed: batches
  never span work units and always have the same number of images.

  Args:
    captioner: generates synthetic captions; None: there are none.
    filter_model: scores image-text pairs.
    seed: of the sampled captions, together with the key of the image.
    per_device_batch_size: images per device and batch.
    generation: decoding options; see `model_lib.Model.caption`.
    prompt: prefix of the captions; None: the captioner's own.
    num_threads: threads that read images.
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
  ):
    self._filter_model = filter_model
    self._generate = captioner and captioner.captioner(prompt, **generation)
    self._transforms = {"filter": filter_model.image}
    if captioner is not None:
      self._transforms["captioner"] = captioner.image
    self._seed = seed
    self._batch_size = per_device_batch_size * sharding.num_data_shards(
      filter_model.mesh
    )
    self._num_threads = num_threads
    self._model_threads = concurrent.futures.ThreadPoolExecutor(
      _NUM_MODEL_THREADS
    )

  def __call__(self, rows: sources.Rows) -> Iterator[list[LabelledImage]]:
    """Yields the labelled images of an open work unit in order, in batches."""
    return self.label(self.read(rows))

  def label(self, batches: Iterable[Batch]) -> Iterator[list[LabelledImage]]:
    """Runs the models on batches that `read` returned."""
    # While the filter scores one batch, the captioner works on the next and
    # the one after that is read.
    with contextlib.ExitStack() as stack:
      for step in (self._add_captions, self._add_scores):
        batches = ahead.map_ahead(step, batches, 1, self._model_threads)
        stack.enter_context(contextlib.closing(batches))
      for batch in batches:
        yield [image for image in batch.images if image is not None]

  def read(self, rows: sources.Rows) -> Iterator[Batch]:
    """Yields the images and web texts of an open work unit, unscored."""
    source = sources.Noted(rows, _unscored)
    bad_images = rejects.Reasons()
    loaded = loader.eval_loader(
      source,
      examples.ImagesExample(self._transforms),
      self._batch_size,
      num_threads=self._num_threads,
      bad_samples=bad_images,
    )
    for number, (pixels, keys) in enumerate(loaded):
      del pixels["valid"]
      start = number * self._batch_size
      images = []
      for row, key in enumerate(keys, start):
        if row >= len(source):
          images.append(None)
          continue
        image = source.notes.pop(row, None) or LabelledImage(row, key)
        if key in bad_images.by_id:
          image = dataclasses.replace(
            image, key=key, bad=bad_images.by_id.pop(key), texts=()
          )
        images.append(image)
      yield Batch(tuple(images), pixels)

  def _add_captions(self, batch: Batch) -> Batch:
    if self._generate is None:
      return batch
    keys = [image.key if image else "" for image in batch.images]
    captions = self._generate(
      batch.pixels["captioner"], self._seed, [*map(image_seed, keys)]
    )
    return dataclasses.replace(
      batch,
      images=tuple(
        image and _with_captions(image, caption)
        for image, caption in zip(batch.images, captions, strict=True)
      ),
    )

  def _add_scores(self, batch: Batch) -> Batch:
    texts = [
      [text.text for text in image.texts if not text.bad] if image else []
      for image in batch.images
    ]
    matches = self._filter_model.matcher.score(
      batch.pixels["filter"], texts, self._batch_size
    )
    return dataclasses.replace(
      batch,
      images=tuple(
        image and _with_scores(image, match)
        for image, match in zip(batch.images, matches, strict=True)
      ),
    )


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
