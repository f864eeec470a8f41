"""Which scene and which text each item of a split has."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int8, Int64, UInt64

from blip_jax.data.scenes import junk as junk_lib
from blip_jax.data.scenes.drawing import (
  JITTER,
  KINDS,
  LAYOUTS,
  SIZES_DIFFER,
  Object,
  Scene,
  render,
)
from blip_jax.data.scenes.texts import describe, descriptions

# Share of all scenes, in percent [from, to), by a hash of what is in them.
SPLITS = {"train": (0, 70), "val": (70, 85), "test": (85, 100)}
DEFAULT_NUM = {"train": 8000, "val": 1000, "test": 1000}


def _hash(numbers: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
  """Mixes the bits of each number (the finaliser of SplitMix64)."""
  # Not a numpy generator: a scene must keep its split in every numpy version.
  x = numbers + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


# A content is a number: a layout and the kinds of its objects, in order and
# without repetition, in mixed radix.
def _content(count: int, number: int) -> tuple[str, list[tuple[str, str]]]:
  """Returns the layout and the (colour, shape) of each object."""
  number, layout = divmod(number, len(LAYOUTS[count]))
  left, chosen = list(KINDS), []
  for _ in range(count):
    number, k = divmod(number, len(left))
    chosen.append(left.pop(k))
  return list(LAYOUTS[count])[layout], chosen


def _contents_of(split: str, count: int, seed: int) -> UInt64[np.ndarray, "n"]:
  """Numbers of all contents of a split, in an order given by the seed."""
  total = len(LAYOUTS[count]) * math.perm(len(KINDS), count)
  numbers = np.arange(total, dtype=np.uint64)
  hashes = _hash(numbers + np.uint64(count << 32))
  percent = hashes % np.uint64(100)
  first, end = SPLITS[split]
  mine = (percent >= first) & (percent < end)
  order = np.argsort(_hash(hashes[mine] ^ _hash(np.array([seed], np.uint64))))
  return numbers[mine][order]


class Scenes:
  """A split of Scenes as a random-access source.

  Scene `i` depends on (seed, split, i) alone; a longer source starts with the
  scenes of a shorter one. Splits share no content, whatever their seeds: a
  content (layout, colours, shapes) belongs to one split for good. Within "val"
  and "test" no content comes twice, so no two items share a description. In
  "train" a content comes again, drawn anew, once all have had their turn.

  Captions take at most 17 tokens, [CLS] and [SEP] included.

  Args:
    split: "train", "val" or "test".
    size: side of the pictures in pixels.
    num: number of items; by default 8,000 to train on, 1,000 held out.
    seed: chooses which contents come, in what order, and how they are drawn.
    noise: share of captions replaced by junk: "swap" (a caption of another
      picture of this split that is untrue here), "boilerplate", "file_name".
      Pictures and other captions stay the same.
    junk: "plain", or "web" for junk as the web has it: most is a "near_miss"
      (one colour, one shape or the order is another) or "vague" (says little,
      or leaves objects out), some is as above.
    counts: shares of scenes with one, two and three objects.
    with_captions: whether records say anything of their pictures.

  Raises:
    ValueError: for an unknown split, a `noise` outside [0, 1], too small a
      `num`, or one that exceeds the distinct contents of a held-out split.
  """

  def __init__(
    self,
    split: str,
    size: int = 32,
    num: int | None = None,
    seed: int = 0,
    noise: float = 0.0,
    junk: str = "plain",
    counts: Sequence[float] = (0.05, 0.92, 0.03),
    with_captions: bool = True,
  ):
    if split not in SPLITS:
      raise ValueError(f"Scenes has no split {split!r}, only {list(SPLITS)}.")
    if not 0 <= noise <= 1:
      raise ValueError(f"Scenes: noise is a share in [0, 1], found {noise}.")
    if junk not in junk_lib.MIXES:
      raise ValueError(
        f"Scenes: junk is one of {list(junk_lib.MIXES)}, found {junk!r}."
      )
    num = DEFAULT_NUM[split] if num is None else num
    if num < (2 if noise else 1):
      raise ValueError(
        f"Scenes {split}: num={num} is too few; noise needs another picture to"
        " take captions from, so at least 2."
      )
    self.split, self.size, self.seed = split, size, seed
    self.noise, self._kinds = noise, junk_lib.MIXES[junk]
    self._with_captions = with_captions
    self._counts, self._numbers = self._plan(num, counts)

  def _plan(
    self, num: int, counts: Sequence[float]
  ) -> tuple[Int8[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """Number of objects and content number of every item."""
    # Spread by the golden ratio, not drawn: every stretch has its shares.
    turns = np.arange(num) * ((math.sqrt(5) - 1) / 2)
    share = (turns + self._rng(0, 3).random()) % 1
    edges = np.cumsum(counts)
    item_counts = np.searchsorted(edges / edges[-1], share, side="right") + 1
    numbers = np.zeros(num, np.int64)
    for count in LAYOUTS:
      items = np.flatnonzero(item_counts == count)
      if not items.size:
        continue
      contents = _contents_of(self.split, count, self.seed)
      if self.split != "train" and items.size > contents.size:
        raise ValueError(
          f"Scenes {self.split}: num={num} with counts={counts} asks for"
          f" {items.size} distinct scenes of {count} object(s); there are"
          f" {contents.size}. Lower num or change counts."
        )
      numbers[items] = contents[np.arange(items.size) % contents.size]
    return item_counts.astype(np.int8), numbers

  def __len__(self) -> int:
    return len(self._numbers)

  def _rng(self, index: int, purpose: int) -> np.random.Generator:
    # One stream per purpose: asking for junk must not redraw the picture.
    split = list(SPLITS).index(self.split)
    return np.random.default_rng((self.seed, split, index, purpose))

  def scene(self, index: int) -> Scene:
    """What picture `index` shows."""
    index = range(len(self))[index]
    rng = self._rng(index, 0)
    count = int(self._counts[index])
    layout, kinds = _content(count, int(self._numbers[index]))
    centres = np.array(LAYOUTS[count][layout])
    centres += rng.uniform(-JITTER, JITTER, centres.shape)
    sizes = ["large"] * count
    if count == 2 and rng.random() < SIZES_DIFFER:
      sizes[rng.integers(count)] = "small"
    objects = tuple(
      Object(shape, colour, size, float(x), float(y))
      for (colour, shape), size, (x, y) in zip(
        kinds, sizes, centres, strict=True
      )
    )
    return Scene(objects, layout, int(rng.integers(2**32)))

  def __getitem__(self, index: int) -> dict:
    """The record of item `index`.

    Beside the usual keys: `noise` names the kind of junk, or is ""; and
    `references` is all that may truly be said of the picture.
    """
    index = range(len(self))[index]
    scene = self.scene(index)
    record = {
      "image": render(scene, self.size),
      "image_id": index,
      "id": f"scenes/{self.split}:{index}",
    }
    if not self._with_captions:
      return record
    caption, noise = describe(scene, self._rng(index, 1)), ""
    rng = self._rng(index, 2)
    if rng.random() < self.noise:
      caption, noise = self._junk(index, rng)
    return {
      **record,
      "caption": caption,
      "noise": noise,
      "references": sorted(descriptions(scene)),
    }

  def _junk(self, index: int, rng: np.random.Generator) -> tuple[str, str]:
    kind = self._kinds[rng.integers(len(self._kinds))]
    if kind == "swap":
      return self._untrue_caption(index, rng), kind
    return junk_lib.write(kind, self.scene(index), rng), kind

  def _untrue_caption(self, index: int, rng: np.random.Generator) -> str:
    true = descriptions(self.scene(index))
    # In "train" another picture may show the same content.
    while (caption := self._caption_of_any(rng)) in true:
      pass
    return caption

  def _caption_of_any(self, rng: np.random.Generator) -> str:
    return describe(self.scene(int(rng.integers(len(self)))), rng)
