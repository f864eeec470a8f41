"""Image-text retrieval: ranking by cosine, and re-ranking by ITM.

Dimensions: N images (or videos), M texts, L text length.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float, Int

from blip_jax.data import examples, sources
from blip_jax.evaluators import base
from blip_jax.evaluators.scores import recall
from blip_jax.inference import scoring
from blip_jax.runtime import progress, train_state
from blip_jax.tasks import base as tasks

# The score that the original gives to candidates that are not re-ranked.
NOT_LISTED = -100.0


class Similarities(NamedTuple):
  """Cosines of all images and texts that could be read.

  Attributes:
    sim: cosines, without the temperature.
    image_of: for each text, the row of `sim` of the image that it belongs to.
    rows: for each image, its row in the source `by_image`.
    text_rows: for each text, its position in `Ranking.texts`.
    tokens: of the texts.
  """

  sim: Float[np.ndarray, "N M"]
  image_of: Int[np.ndarray, " M"]
  rows: Int[np.ndarray, " N"]
  text_rows: Int[np.ndarray, " M"]
  tokens: scoring.Texts


class ShortLists(NamedTuple):
  """The candidates to re-rank: texts for each image, images for each text.

  A pair on both lists is scored once.
  """

  i2t: Bool[np.ndarray, "N M"]
  t2i: Bool[np.ndarray, "M N"]

  @classmethod
  def nearest(cls, sim: Float[np.ndarray, "N M"], k: int) -> "ShortLists":
    """Lists the k most similar candidates, or all if there are fewer."""
    return cls(_best(sim, k), _best(sim.T, k))

  @property
  def pairs(self) -> Bool[np.ndarray, "N M"]:
    """Pairs on either list."""
    return self.i2t | self.t2i.T

  def ranked(
    self, scores: Float[np.ndarray, "N M"]
  ) -> tuple[Float[np.ndarray, "N M"], Float[np.ndarray, "M N"]]:
    """Scores of both directions; candidates that are not listed come last."""
    return (
      np.where(self.i2t, scores, NOT_LISTED),
      np.where(self.t2i, scores.T, NOT_LISTED),
    )


def _best(sim: Float[np.ndarray, "N M"], k: int) -> Bool[np.ndarray, "N M"]:
  k = min(k, sim.shape[1])
  best = np.argpartition(-sim, k - 1, axis=1)[:, :k]
  listed = np.zeros(sim.shape, bool)
  np.put_along_axis(listed, best, True, axis=1)
  return listed


class Ranking:
  """Recall at 1, 5 and 10 over a split, in both directions.

  All captions of an image count, in one row or in several: any of them finds
  it.

  With `k_test`, the `k_test` candidates with the largest cosines are re-ranked
  as in the paper (section 5.1): ITM adds its logit, and all others come after
  them. Recall before ITM re-ranking is then reported as `itc_...`. Image tokens
  of a whole split would not fit in memory, so images are encoded once more,
  block by block; that costs little compared with the ITM of their texts.

  With `num_frames`, the images are videos (section 5.6): their feature is the
  mean of those of the frames, and texts attend to the tokens of all frames.

  Args:
    split: held-out pairs; a row may have several captions, and an image
      several rows.
    task: with the predict functions of `tasks.align`.
    k_test: candidates to re-rank; 0: none.
    num_frames: sampled from each video; 0: the split has images.
  """

  def __init__(
    self,
    split: base.Split,
    task: tasks.Task,
    k_test: int = 0,
    num_frames: int = 0,
  ):
    self._split = split.by_image
    self._k_test = k_test
    self._num_frames = num_frames
    self._config = task.model.config
    self._scorer = scoring.Scorer(task.predict_fns, split.mesh)
    self._image_example = split.image_example(num_frames)
    self._recall = recall.video_recall if num_frames else recall.recall
    self.texts, self._row_of_text = _texts(self._split.source)

  def run(self, state: train_state.TrainState) -> Iterator[tuple[str, float]]:
    similarities = self.similarities(state.params)
    sim, image_of = similarities.sim, similarities.image_of
    by_itc = self._recall(sim, sim.T, image_of)
    if not self._k_test:
      yield from by_itc.items()
      return
    scores = self.rerank(state.params, similarities)
    yield from self._recall(*scores, image_of).items()
    yield from ((f"itc_{metric}", value) for metric, value in by_itc.items())

  def similarities(self, params: tasks.Params) -> Similarities:
    """Encodes all images and texts, and compares each with each."""
    example = self._split.example

    def image_feat(batch):
      return self._scorer.image_features(params, batch["image"])[1]

    def text_feat(batch):
      text = tasks.text(batch)
      return self._scorer.text_feat(params, *text), *text

    image, readable = self._in_blocks(self._split.source).map(
      image_feat, self._image_example
    )
    (text, *tokens), usable = self._split.map(
      text_feat,
      examples.TextExample(
        example.tokenizer, example.max_words, example.max_length
      ),
      self.texts,
    )
    # A text counts if its image can be read, and an image if it has a text.
    usable = usable & readable[self._row_of_text]
    readable = readable & np.isin(
      np.arange(len(readable)), self._row_of_text[usable]
    )
    new_row = np.cumsum(readable) - 1
    return Similarities(
      sim=image[readable] @ text[usable].T,
      image_of=new_row[self._row_of_text[usable]],
      rows=np.flatnonzero(readable),
      text_rows=np.flatnonzero(usable),
      tokens=scoring.Texts(*(x[usable] for x in tokens)),
    )

  def rerank(
    self, params: tasks.Params, similarities: Similarities
  ) -> tuple[Float[np.ndarray, "N M"], Float[np.ndarray, "M N"]]:
    """Scores of texts for each image, and of images for each text."""
    lists = ShortLists.nearest(similarities.sim, self._k_test)
    pairs, scores = lists.pairs, similarities.sim.copy()
    # Images with similar numbers of candidates share a block, so that few have
    # to wait for the others.
    order = np.argsort(-pairs.sum(axis=1), kind="stable")
    bar = progress.bar(
      total=int(pairs.sum()), unit="pair", disable=jax.process_index() > 0
    )
    with bar:
      for block, embeds in self._encoded(params, similarities, order):
        candidates = [np.flatnonzero(pairs[row]) for row in block]
        logits = self._match_logits(
          params, embeds, similarities.tokens, candidates
        )
        for row, texts, logit in zip(block, candidates, logits, strict=True):
          scores[row, texts] += logit
          bar.update(len(texts))
    return lists.ranked(scores)

  def _encoded(
    self,
    params: tasks.Params,
    similarities: Similarities,
    order: Int[np.ndarray, " N"],
  ) -> Iterator[tuple[Int[np.ndarray, " I"], Float[Array, "_ L D"]]]:
    """Blocks of images: their rows of `sim`, and their tokens on the mesh."""
    rows = similarities.rows[order]
    split = self._in_blocks(sources.Rows(self._split.source, rows))
    for number, (batch, _) in enumerate(split.batches(self._image_example)):
      embeds, _ = self._scorer.image_features(params, batch["image"])
      yield order[number * split.batch_size :][: split.batch_size], embeds

  def _in_blocks(self, source: Any) -> base.Split:
    """A split of images, in batches that fit in memory while re-ranked."""
    block = scoring.block_size(
      self._config,
      self._split.mesh,
      self._split.example.max_length,
      max(self._num_frames, 1),
    )
    size = min(block, self._split.batch_size)
    return dataclasses.replace(self._split, source=source, batch_size=size)

  def _match_logits(
    self,
    params: tasks.Params,
    embeds: Float[Array, "_ L D"],
    tokens: scoring.Texts,
    candidates: list[Int[np.ndarray, "_"]],
  ) -> list[Float[np.ndarray, "_"]]:
    """ITM logits of all processes' images with their candidates, on every
    process."""
    # The padding of the last block has no candidates.
    padding = [np.empty(0, int)] * (len(embeds) - len(candidates))
    padded = candidates + padding
    num_local = len(padded) // jax.process_count()
    first = num_local * jax.process_index()
    local_logits = self._scorer.itm_logits(
      params, embeds, tokens, padded[first : first + num_local]
    )
    # Processes exchange arrays of one shape.
    logits = np.zeros((num_local, max(map(len, candidates))), np.float32)
    for row, image_logits in zip(logits, local_logits, strict=True):
      row[: len(image_logits)] = image_logits[:, 1]
    logits = multihost_utils.process_allgather(logits, tiled=True)
    return [
      row[: len(texts)] for row, texts in zip(logits, candidates, strict=False)
    ]


def _texts(source: Any) -> tuple[list[sources.Record], Int[np.ndarray, " M"]]:
  """All captions of a source as records, and the row that each belongs to."""
  texts, row_of_text = [], []
  for row in range(len(source)):
    try:
      record = source[row]
    except sources.BadRow:
      continue  # The pass over the images counts it.
    for number, caption in enumerate(sources.captions(record)):
      texts.append({"caption": caption, "id": f"{record['id']}#{number}"})
      row_of_text.append(row)
  return texts, np.array(row_of_text)
