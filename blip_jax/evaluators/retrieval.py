"""Image-text retrieval by ITC: ranking by the cosine of unit vectors."""

from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Float, Int

from blip_jax.data import sources
from blip_jax.evaluators import base
from blip_jax.evaluators.scores import recall
from blip_jax.runtime import train_state
from blip_jax.tasks import base as tasks


class Retrieval:
  """Recall at 1, 5 and 10 over a whole split, in both directions.

  All captions of a picture count, so a picture with five is found by any.
  """

  def __init__(self, split: base.Split, task: tasks.Task):
    self._split = split
    features = task.predict_fns["image_features"]
    text_feat = task.predict_fns["text_feat"]
    self._image_feat = jax.jit(lambda params, image: features(params, image)[1])
    self._text_feat = jax.jit(text_feat)
    self.texts, self._image_of = _texts(split.source)

  def run(self, state: train_state.TrainState) -> Iterator[tuple[str, float]]:
    sim, image_of, _, _ = self.similarities(state.params)
    yield from recall.recall(sim, sim.T, image_of).items()

  def similarities(
    self, params: tasks.Params
  ) -> tuple[
    Float[np.ndarray, "N M"],
    Int[np.ndarray, " M"],
    Int[np.ndarray, " N"],
    Int[np.ndarray, " M"],
  ]:
    """Cosines of all pictures and texts that could be read.

    Returns:
      The cosines; the picture (row of them) that each text belongs to; the row
      in the source of each picture; the row in `texts` of each text.
    """
    example = self._split.example
    image, readable = self._split.map(
      lambda batch: self._image_feat(params, batch["image"]),
      base.ImageExample(example.image),
    )
    text, usable = self._split.map(
      lambda batch: self._text_feat(
        params, batch["input_ids"], batch["attention_mask"]
      ),
      base.TextExample(
        example.tokenizer, example.max_words, example.max_length
      ),
      self.texts,
    )
    usable = usable & readable[self._image_of]
    # A picture without a text has no right answer to be found.
    readable = readable & np.isin(
      np.arange(len(readable)), self._image_of[usable]
    )
    new_row = np.cumsum(readable) - 1
    image_of = new_row[self._image_of[usable]]
    sim = image[readable] @ text[usable].T
    return sim, image_of, np.flatnonzero(readable), np.flatnonzero(usable)


def _texts(source) -> tuple[list[sources.Record], Int[np.ndarray, " M"]]:
  """All captions of a source as records, and the row that each is of."""
  texts, image_of = [], []
  for row in range(len(source)):
    try:
      record = source[row]
    except sources.BadRow:
      continue  # The pass over the pictures takes note of it.
    for number, caption in enumerate(base.captions(record)):
      texts.append({"caption": caption, "id": f"{record['id']}#{number}"})
      image_of.append(row)
  return texts, np.array(image_of)
