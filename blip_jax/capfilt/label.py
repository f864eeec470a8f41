"""What captioner and filter say of the pictures of a unit.

A picture gets synthetic captions, and the filter looks at each of its texts,
from the web and synthetic. Each model encodes a picture once.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

from blip_jax.data import examples, loader, rejects, sources, transforms
from blip_jax.inference import matching
from blip_jax.inference import model as model_lib
from blip_jax.runtime import ahead, sharding

# That may be under way at once: two of the captioner's and two of the filter's.
_STEPS = 4
WEB, SYNTHETIC = "web", "synthetic"


@dataclasses.dataclass(frozen=True)
class Text:
  """A text of a picture, and what is known of it.

  Attributes:
    text: as the collection has it, or as the captioner wrote it.
    source: WEB or SYNTHETIC.
    bad: why it is no text; the filter did not see it then.
    itm_prob: that it belongs to the picture, says the filter; or None.
    itc_cosine: of their unit vectors; or None.
    log_prob: of a synthetic one, given the picture; or None.
  """

  text: str
  source: str
  bad: str = ""
  itm_prob: float | None = None
  itc_cosine: float | None = None
  log_prob: float | None = None


@dataclasses.dataclass(frozen=True)
class Labelled:
  """A picture of a unit.

  Attributes:
    row: its place in the unit.
    key: of the record; seeds what is sampled.
    image: its path; "" if it lies in a shard or a table.
    image_id: what the annotation calls it, or None.
    bad: why it cannot be used; "" if it can.
    texts: in order: from the web, then synthetic.
  """

  row: int
  key: str
  image: str = ""
  image_id: str | None = None
  bad: str = ""
  texts: tuple[Text, ...] = ()


@dataclasses.dataclass(frozen=True)
class Batch:
  """Pictures in the sizes of the models, as many as a device batch has."""

  pictures: tuple[Labelled | None, ...]  # None: fills up the last batch
  pixels: dict[str, UInt8[np.ndarray, "I H W 3"]]


class Labeller:
  """The models of a job on this process's devices.

  What comes out depends on the unit, the settings and the seed alone: batches
  begin anew with each unit and have always the same number of pictures.

  Args:
    captioner: writes; None: no captions are written.
    judge: the filter.
    seed: of what is sampled, together with a picture's key.
    per_device_batch_size: pictures that a device computes at once.
    generation: how to write; see `model_lib.Model.caption`.
    prompt: what captions go on from; None: the model's own.
    num_threads: that read pictures.
  """

  def __init__(
    self,
    captioner: model_lib.Model | None,
    judge: model_lib.Model,
    *,
    seed: int,
    per_device_batch_size: int,
    generation: dict[str, Any],
    prompt: str | None = None,
    num_threads: int = 8,
  ):
    self._judge = judge
    self._write = captioner and captioner.captioner(prompt, **generation)
    self._images = {"judge": judge.image}
    if captioner is not None:
      self._images["captioner"] = captioner.image
    self._seed = seed
    self._batch = per_device_batch_size * sharding.num_data_shards(judge.mesh)
    self._num_threads = num_threads
    self._threads = concurrent.futures.ThreadPoolExecutor(_STEPS)

  def __call__(self, rows: sources.Rows) -> Iterator[list[Labelled]]:
    """The pictures of a unit that is open, some at a time, in order."""
    return self.label(self.read(rows))

  def label(self, batches: Iterable[Batch]) -> Iterator[list[Labelled]]:
    """What the models say of pictures that were read."""
    # While the filter looks at one batch, the captioner writes about the next
    # and the one after that is read.
    with contextlib.ExitStack() as stack:
      for step in (self._captioned, self._judged):
        batches = ahead.map_ahead(step, batches, 1, self._threads)
        stack.enter_context(contextlib.closing(batches))
      for batch in batches:
        yield [picture for picture in batch.pictures if picture is not None]

  def read(self, rows: sources.Rows) -> Iterator[Batch]:
    """Pictures and texts of a unit, before any model has seen them."""
    source = sources.Noted(rows, _note)
    bad = rejects.Reasons()
    loaded = loader.eval_loader(
      source,
      examples.ImagesExample(self._images),
      self._batch,
      num_threads=self._num_threads,
      bad_samples=bad,
    )
    for number, (pixels, ids) in enumerate(loaded):
      del pixels["valid"]
      start = number * self._batch
      pictures = []
      for place, key in enumerate(ids, start):
        if place >= len(source):
          pictures.append(None)
          continue
        picture = source.notes.pop(place, None) or Labelled(place, key)
        if key in bad.of:
          picture = dataclasses.replace(
            picture, key=key, bad=bad.of.pop(key), texts=()
          )
        pictures.append(picture)
      yield Batch(tuple(pictures), pixels)

  def _captioned(self, batch: Batch) -> Batch:
    if self._write is None:
      return batch
    keys = [picture.key if picture else "" for picture in batch.pictures]
    written = self._write(
      batch.pixels["captioner"], self._seed, [*map(image_seed, keys)]
    )
    return dataclasses.replace(
      batch,
      pictures=tuple(
        picture and _with_captions(picture, caption)
        for picture, caption in zip(batch.pictures, written, strict=True)
      ),
    )

  def _judged(self, batch: Batch) -> Batch:
    texts = [
      [text.text for text in picture.texts if not text.bad] if picture else []
      for picture in batch.pictures
    ]
    found = self._judge.matcher.score(batch.pixels["judge"], texts, self._batch)
    return dataclasses.replace(
      batch,
      pictures=tuple(
        picture and _with_scores(picture, match)
        for picture, match in zip(batch.pictures, found, strict=True)
      ),
    )


def image_seed(key: str) -> int:
  """The number by which a picture's draws differ from another's."""
  return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little")


def _with_captions(picture: Labelled, caption: model_lib.Caption) -> Labelled:
  if picture.bad:
    return picture
  written = tuple(
    _text(one.text, SYNTHETIC, log_prob=one.log_prob)
    for one in (caption, *caption.others)
  )
  return dataclasses.replace(picture, texts=picture.texts + written)


def _with_scores(picture: Labelled, match: matching.Match) -> Labelled:
  scores = zip(match.itm_prob, match.itc_cosine, strict=True)
  texts = []
  for text in picture.texts:
    if not text.bad:
      prob, cosine = next(scores)
      text = dataclasses.replace(
        text, itm_prob=float(prob), itc_cosine=float(cosine)
      )
    texts.append(text)
  return dataclasses.replace(picture, texts=tuple(texts))


def _text(text: str | bytes, source: str, **known: float) -> Text:
  try:
    return Text(transforms.clean_text(text), source, **known)
  except transforms.BadSample as bad:
    if isinstance(text, bytes):
      text = text.decode(errors="replace")
    # Of a huge one, enough to see what it was.
    return Text(
      text.encode(errors="replace").decode()[:200], source, bad.reason, **known
    )


def _note(place: int, record: sources.Record) -> Labelled:
  """All of a record but its pixels."""
  name = record.get("image_id")
  texts = [_text(text, WEB) for text in record["caption"]]
  if "no_text" in record:
    texts.append(Text("", WEB, record["no_text"]))
  return Labelled(
    place,
    record["id"],
    sources.image_path(record),
    None if name is None else str(name),
    texts=tuple(texts),
  )
