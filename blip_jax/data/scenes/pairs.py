"""A split of statements about two scenes each."""

import functools

import numpy as np

from blip_jax.data.scenes import source, stating
from blip_jax.data.scenes.drawing import Scene, render

# Contents that are sampled at once until one fits.
_SAMPLED = 64


class Statements:
  """Statements about pairs of scenes, as a random-access source.

  Every statement is there twice, about a pair that makes it true and about one
  that makes it false. So whoever sees only the text is right half of the time,
  and consistency (`evaluators.comparing`) counts statements of two rows.

  Item `i` depends only on (seed, split, i). Splits share no content of a scene.

  Args:
    split: "train", "val" or "test".
    size: side of the images in pixels.
    num: number of items; by default 8,000 for "train" and 1,000 for the
      held-out splits.
    seed: of the statements and their scenes.

  Raises:
    ValueError: `split` is unknown, or `num` is too small.
  """

  def __init__(
    self, split: str, size: int = 32, num: int | None = None, seed: int = 0
  ):
    if split not in source.SPLITS:
      raise ValueError(
        f"Scenes: expected one of the splits {list(source.SPLITS)}, found "
        f"{split!r}"
      )
    self._num = source.DEFAULT_NUM[split] if num is None else num
    if self._num < 1:
      raise ValueError(
        f"Scenes {split}, ?num=: expected at least 1, found {num}"
      )
    self.split, self.size, self.seed = split, size, seed

  def __len__(self) -> int:
    return self._num

  def _rng(self, index: int, purpose: int) -> np.random.Generator:
    # Purposes below 10 are those of `source.Scenes`.
    split = list(source.SPLITS).index(self.split)
    return np.random.default_rng((self.seed, split, index, 10 + purpose))

  def statement(self, index: int) -> stating.Statement:
    """Returns the statement of item `index`."""
    number = range(len(self))[index] // 2
    return stating.state(number, self._rng(number, 0))

  def scenes(self, index: int) -> tuple[Scene, Scene]:
    """Returns the left and the right scene of item `index`."""
    statement = self.statement(index)
    rng = self._rng(index, 1)
    pairs = statement.false if index % 2 else statement.true
    left, right = pairs[rng.integers(len(pairs))]
    return self._scene(left, rng), self._scene(right, rng)

  def _scene(self, side: stating.Side, rng: np.random.Generator) -> Scene:
    total = source.num_contents(side.count)
    while True:
      numbers = rng.integers(total, size=_SAMPLED).astype(np.uint64)
      in_split, _ = source.contents_in(self.split, side.count, numbers)
      for number in numbers[in_split].tolist():
        if side.fits(source.content(side.count, number)[1]):
          return source.make_scene(side.count, number, rng)

  def __getitem__(self, index: int) -> dict:
    """Returns the record of item `index`; see `data.statements`."""
    index = range(len(self))[index]
    draw = functools.partial(render, size=self.size)
    return {
      "images": tuple(draw(scene) for scene in self.scenes(index)),
      "statement": self.statement(index).text,
      "label": index % 2 == 0,
      "statement_id": f"{self.split}-{index}",
      "group": f"{self.split}-{index // 2}",
      "id": f"scenes/{self.split}:{index}",
    }
