"""What the loop knows of an evaluator, and what evaluators share."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Bool

from blip_jax.data import datasets, loader, rejects, sources, transforms
from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.models import decoding
from blip_jax.runtime import sharding, train_state
from blip_jax.tasks import base as tasks


@runtime_checkable
class Evaluator(Protocol):
  def run(self, state: train_state.TrainState) -> Iterator[tuple[str, float]]:
    """Yields (metric, value); the caller knows which split it is."""


@dataclasses.dataclass
class Split:
  """Held-out rows, and how to run a program over them on the mesh.

  Attributes:
    source: random access to records.
    example: record to model inputs, without augmentation.
    batch_size: rows per batch of all processes together.
    mesh: where programs run.
    bad_samples: takes note of rows that cannot be read.
  """

  source: Any
  example: datasets.PairExample
  batch_size: int
  mesh: jax.sharding.Mesh
  bad_samples: rejects.BadSamples

  def __post_init__(self):
    # Every shard gets the same number of rows; the padding is masked anyway.
    self.batch_size = sharding.whole_batch(self.batch_size, self.mesh)

  def batches(
    self, example: loader.Example | None = None, source: Any = None
  ) -> Iterator[tuple[dict[str, jax.Array], list[str]]]:
    """Batches on the mesh, and the ids of this process's rows."""
    rows = loader.eval_loader(
      self.source if source is None else source,
      example or self.example,
      self.batch_size // jax.process_count(),
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      bad_samples=self.bad_samples,
    )
    with sharding.activate(self.mesh):
      for arrays, ids in rows:
        yield sharding.put_batch(arrays, self.mesh), ids

  def map(
    self,
    program: Callable[[dict[str, jax.Array]], Any],
    example: loader.Example | None = None,
    source: Any = None,
  ) -> tuple[Any, Bool[np.ndarray, " n"]]:
    """All rows of `program`, in order and on every host.

    Args:
      program: a jitted function of a batch; its outputs have a row per row.
      example: record to inputs, if not the split's.
      source: rows, if not the split's.

    Returns:
      Arrays of as many rows as the source, and which of them are valid: a row
      that could not be read is zeros.
    """
    chunks = []
    for batch, _ in self.batches(example, source):
      rows = program(batch), batch["valid"]
      chunks.append(multihost_utils.process_allgather(rows, tiled=True))
    number = len(self.source if source is None else source)
    join = lambda *parts: np.concatenate(parts)[:number]
    return jax.tree.map(join, *chunks)


@dataclasses.dataclass(frozen=True)
class ImageExample:
  """The picture of a record alone.

  Attributes:
    num_frames: of each, which then is a video; 0: they are pictures.
  """

  image: transforms.EvalImage
  max_pixels: int = datasets.MAX_PIXELS
  num_frames: int = 0

  def __call__(self, record: sources.Record, rng: np.random.Generator):
    if self.num_frames:
      # Needs an extra of the package.
      from blip_jax.data import video

      size = self.image.size
      return {"image": video.read(record["image"], self.num_frames, size)}
    picture = transforms.decode(record["image"], self.max_pixels)
    return {"image": self.image(picture)}


@dataclasses.dataclass(frozen=True)
class TextExample:
  """The caption of a record alone."""

  tokenizer: tokenizer_lib.Tokenizer
  max_words: int
  max_length: int

  def __call__(self, record: sources.Record, rng: np.random.Generator):
    text = transforms.clean_text(record["caption"])
    text = transforms.pre_caption(text, self.max_words)
    ids, mask = self.tokenizer.encode([text], self.max_length)
    return {"input_ids": ids[0], "attention_mask": mask[0]}


class CaptionWriter:
  """Captions of pictures, behind a prompt; one program for all of them."""

  def __init__(
    self,
    split: Split,
    task: tasks.Task,
    settings: decoding.Decoding,
    prompt: str,
  ):
    self._split = split
    self._prompt = prompt
    start = jnp.array(split.example.tokenizer.prompt_ids(prompt))
    room = decoding.room_for(
      settings.max_length, task.model.config.med.max_positions
    )
    write = task.predict_fns["caption"]
    self._write = jax.jit(
      lambda params, image: write(params, image, start, settings, room).ids[
        :, 0
      ]
    )

  def __call__(
    self, params: tasks.Params, source: Any = None
  ) -> tuple[list[str], Bool[np.ndarray, " n"]]:
    """A text for every row of a source (default: the split's), and which of
    them could be read."""
    example = self._split.example
    ids, valid = self._split.map(
      lambda batch: self._write(params, batch["image"]),
      ImageExample(example.image),
      source,
    )
    return example.tokenizer.decode(ids, self._prompt), valid


def true_captions(
  record: sources.Record, example: datasets.PairExample
) -> set[str]:
  """All that is right to write of a record: its `references` (what may truly
  be said of a rendered scene) or its captions, as a model reads them."""
  known = record.get("references", sources.captions(record))
  return {transforms.pre_caption(text, example.max_words) for text in known}
