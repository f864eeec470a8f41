"""Image-text retrieval: ranking by cosine, and the best ranked anew by ITM.

Dimensions: N pictures (or videos), M texts, L text length.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from jaxtyping import Bool, Float, Int

from blip_jax.data import examples, sources
from blip_jax.evaluators import base
from blip_jax.evaluators.scores import recall
from blip_jax.inference import scoring
from blip_jax.runtime import train_state
from blip_jax.tasks import base as tasks

# What the original gives to candidates that are not on the short list.
NOT_LISTED = -100.0


class Similarities(NamedTuple):
  """Cosines of all pictures and texts that could be read.

  Attributes:
    sim: the cosines, without temperature.
    image_of: the picture (row of `sim`) that each text belongs to.
    rows: where the pictures are in the source.
    text_rows: where the texts are in `Ranking.texts`.
    tokens: of the texts.
  """

  sim: Float[np.ndarray, "N M"]
  image_of: Int[np.ndarray, " M"]
  rows: Int[np.ndarray, " N"]
  text_rows: Int[np.ndarray, " M"]
  tokens: scoring.Texts


class ShortLists(NamedTuple):
  """Which candidates are ranked anew: texts of a picture, pictures of a text.

  A pair on both lists has one score and is looked at once.
  """

  i2t: Bool[np.ndarray, "N M"]
  t2i: Bool[np.ndarray, "M N"]

  @classmethod
  def of(cls, sim: Float[np.ndarray, "N M"], k: int) -> "ShortLists":
    """The k most similar of each, or all that there are."""
    return cls(_best(sim, k), _best(sim.T, k))

  @property
  def wanted(self) -> Bool[np.ndarray, "N M"]:
    return self.i2t | self.t2i.T

  def ranked(
    self, scores: Float[np.ndarray, "N M"]
  ) -> tuple[Float[np.ndarray, "N M"], Float[np.ndarray, "M N"]]:
    """Scores of both directions, in which those on no list come last."""
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
  """Recall at 1, 5 and 10 over a whole split, in both directions.

  All captions of a picture count, so a picture with five is found by any.

  With `k_test`, candidates are ranked as in the paper (section 5.1): of the
  `k_test` with the largest cosine ITM adds its logit, the others go behind
  them. Recall by cosine alone is then called `itc_...`. Nothing of the size of
  image tokens is kept for that: pictures are encoded once more, block by block,
  which costs little beside the texts that look at them.

  With `num_frames`, pictures are videos (section 5.6): the feature of one is
  the mean of its frames', and texts look at the tokens of all of them.
  """

  def __init__(
    self,
    split: base.Split,
    task: tasks.Task,
    k_test: int = 0,
    num_frames: int = 0,
  ):
    self._split = split
    self._k_test = k_test
    self._num_frames = num_frames
    self._config = task.model.config
    self._scorer = scoring.Scorer(task.predict_fns, split.mesh)
    self._picture = examples.ImageExample(
      split.example.image, num_frames=num_frames
    )
    self._recall = recall.video_recall if num_frames else recall.recall
    self.texts, self._image_of = _texts(split.source)

  def run(self, state: train_state.TrainState) -> Iterator[tuple[str, float]]:
    seen = self.similarities(state.params)
    by_itc = self._recall(seen.sim, seen.sim.T, seen.image_of)
    if not self._k_test:
      yield from by_itc.items()
      return
    scores = self.rerank(state.params, seen)
    yield from self._recall(*scores, seen.image_of).items()
    yield from ((f"itc_{metric}", value) for metric, value in by_itc.items())

  def similarities(self, params: tasks.Params) -> Similarities:
    """Ranks everything with everything."""
    example = self._split.example

    def image_feat(batch):
      return self._scorer.image_features(params, batch["image"])[1]

    def text_feat(batch):
      text = tasks.text(batch)
      return self._scorer.text_feat(params, *text), *text

    image, readable = self._pictures(self._split.source).map(
      image_feat, self._picture
    )
    (text, *tokens), usable = self._split.map(
      text_feat,
      examples.TextExample(
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
    return Similarities(
      sim=image[readable] @ text[usable].T,
      image_of=new_row[self._image_of[usable]],
      rows=np.flatnonzero(readable),
      text_rows=np.flatnonzero(usable),
      tokens=scoring.Texts(*(x[usable] for x in tokens)),
    )

  def rerank(
    self, params: tasks.Params, seen: Similarities
  ) -> tuple[Float[np.ndarray, "N M"], Float[np.ndarray, "M N"]]:
    """Scores of texts for each picture, and of pictures for each text."""
    lists = ShortLists.of(seen.sim, self._k_test)
    wanted, scores = lists.wanted, seen.sim.copy()
    # Those with equally many texts side by side, so that none wait.
    order = np.argsort(-wanted.sum(axis=1), kind="stable")
    bar = tqdm.tqdm(
      total=int(wanted.sum()), unit="pair", disable=jax.process_index() > 0
    )
    with bar:
      for block, embeds in self._encoded(params, seen, order):
        texts = [np.flatnonzero(wanted[row]) for row in block]
        logits = self._logits(params, embeds, seen.tokens, texts)
        for row, own, logit in zip(block, texts, logits, strict=True):
          scores[row, own] += logit
          bar.update(len(own))
    return lists.ranked(scores)

  def _encoded(self, params, seen: Similarities, order):
    """Pictures block by block: their rows, and their tokens on the mesh."""
    split = self._pictures(sources.Rows(self._split.source, seen.rows[order]))
    for number, (batch, _) in enumerate(split.batches(self._picture)):
      embeds, _ = self._scorer.image_features(params, batch["image"])
      yield order[number * split.batch_size :][: split.batch_size], embeds

  def _pictures(self, source) -> base.Split:
    """A split of as many pictures at a time as there is room for."""
    block = scoring.block_size(
      self._config,
      self._split.mesh,
      self._split.example.max_length,
      max(self._num_frames, 1),
    )
    size = min(block, self._split.batch_size)
    return dataclasses.replace(self._split, source=source, batch_size=size)

  def _logits(self, params, embeds, tokens, texts) -> list[np.ndarray]:
    """Of every process's pictures, on every process."""
    # The last block is filled up with pictures that nothing looks at.
    wanted = texts + [np.empty(0, int)] * (len(embeds) - len(texts))
    own = len(wanted) // jax.process_count()
    first = own * jax.process_index()
    found = self._scorer.itm_logits(
      params, embeds, tokens, wanted[first : first + own]
    )
    padded = np.zeros((own, max(map(len, texts))), np.float32)
    for row, logits in zip(padded, found, strict=True):
      row[: len(logits)] = logits[:, 1]
    padded = multihost_utils.process_allgather(padded, tiled=True)
    return [row[: len(of)] for row, of in zip(padded, texts, strict=False)]


def _texts(source) -> tuple[list[sources.Record], Int[np.ndarray, " M"]]:
  """All captions of a source as records, and the row that each is of."""
  texts, image_of = [], []
  for row in range(len(source)):
    try:
      record = source[row]
    except sources.BadRow:
      continue  # The pass over the pictures takes note of it.
    for number, caption in enumerate(sources.captions(record)):
      texts.append({"caption": caption, "id": f"{record['id']}#{number}"})
      image_of.append(row)
  return texts, np.array(image_of)
