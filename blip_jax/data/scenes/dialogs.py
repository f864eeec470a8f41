"""A split of dialogs about scenes."""

import numpy as np

from blip_jax.data.dialogs import Round
from blip_jax.data.scenes import source, talking
from blip_jax.data.scenes.drawing import render


class Dialogs:
  """Dialogs about scenes of two objects, as a random-access source.

  Item `i` depends only on (seed, split, i); its scene is that of `Scenes`.
  Splits share no content of a scene.

  Args:
    split: "train", "val" or "test".
    size: side of the images in pixels.
    num: number of items; by default 8,000 for "train" and 1,000 for the
      held-out splits.
    seed: of the scenes and the dialogs.

  Raises:
    ValueError: `split` is unknown, or `num` is too small, or larger than the
      number of distinct contents of a held-out split.
  """

  def __init__(
    self, split: str, size: int = 32, num: int | None = None, seed: int = 0
  ):
    self._scenes = source.Scenes(
      split, size, num, seed, counts=(0.0, 1.0, 0.0), with_captions=False
    )

  def __len__(self) -> int:
    return len(self._scenes)

  def _rng(self, index: int) -> np.random.Generator:
    scenes = self._scenes
    split = list(source.SPLITS).index(scenes.split)
    # Purposes below 20 are those of `source.Scenes` and `pairs.Statements`.
    return np.random.default_rng((scenes.seed, split, index, 20))

  def __getitem__(self, index: int) -> dict:
    """Returns the record of item `index`; see `data.dialogs`."""
    index = range(len(self))[index]
    scene = self._scenes.scene(index)
    talk = talking.talk(scene, self._rng(index))
    rounds = tuple(
      Round(
        each.question,
        each.answer,
        each.candidates,
        each.candidates.index(each.answer),
        tuple(float(text == each.answer) for text in each.candidates),
      )
      for each in talk.rounds
    )
    return {
      "image": render(scene, self._scenes.size),
      "context": talk.caption,
      "dialog": rounds,
      "dialog_id": index,
      "image_id": index,
      "id": f"scenes/{self._scenes.split}:{index}",
    }
