"""A split of Scenes: the scene and the caption of each item."""

import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int8, Int64, UInt64

from blip_jax.data.scenes import asking
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

# Each split has the contents whose hash modulo 100 is in [start, stop).
SPLITS = {"train": (0, 70), "val": (70, 85), "test": (85, 100)}
DEFAULT_NUM = {"train": 8000, "val": 1000, "test": 1000}


def _hash(numbers: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
  """Hashes each number (with the finaliser of SplitMix64)."""
  # No numpy generator, because the split of a scene must not depend on the
  # version of numpy.
  x = numbers + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def content(count: int, number: int) -> tuple[str, list[tuple[str, str]]]:
  """Returns the layout and the (colour, shape) of each object.

  The content of a scene is encoded as one number in mixed radix: its layout,
  and the kinds of its objects, in order and without repetition.
  """
  number, layout = divmod(number, len(LAYOUTS[count]))
  remaining, chosen = list(KINDS), []
  for _ in range(count):
    number, index = divmod(number, len(remaining))
    chosen.append(remaining.pop(index))
  return list(LAYOUTS[count])[layout], chosen


def num_contents(count: int) -> int:
  """The number of contents with `count` objects, of all splits together."""
  return len(LAYOUTS[count]) * math.perm(len(KINDS), count)


def contents_in(
  split: str, count: int, numbers: UInt64[np.ndarray, "n"]
) -> tuple[Bool[np.ndarray, "n"], UInt64[np.ndarray, "n"]]:
  """Returns which contents are of a split, and the hashes of all."""
  hashes = _hash(numbers + np.uint64(count << 32))
  percent = hashes % np.uint64(100)
  start, stop = SPLITS[split]
  return (percent >= start) & (percent < stop), hashes


# Shuffling takes 10 ms, and a job opens its source for each of its parts.
@functools.lru_cache(maxsize=16)
def _contents_of(split: str, count: int, seed: int) -> UInt64[np.ndarray, "n"]:
  """Returns the numbers of all contents of a split, shuffled by the seed."""
  numbers = np.arange(num_contents(count), dtype=np.uint64)
  in_split, hashes = contents_in(split, count, numbers)
  seed_hash = _hash(np.array([seed], np.uint64))
  order = np.argsort(_hash(hashes[in_split] ^ seed_hash))
  contents = numbers[in_split][order]
  contents.setflags(write=False)  # it is kept
  return contents


def make_scene(count: int, number: int, rng: np.random.Generator) -> Scene:
  """Returns a scene with a content; `rng` chooses what captions do not say."""
  layout, kinds = content(count, number)
  centres = np.array(LAYOUTS[count][layout])
  centres += rng.uniform(-JITTER, JITTER, centres.shape)
  sizes = ["large"] * count
  if count == 2 and rng.random() < SIZES_DIFFER:
    sizes[rng.integers(count)] = "small"
  objects = tuple(
    Object(shape, colour, size, float(x), float(y))
    for (colour, shape), size, (x, y) in zip(kinds, sizes, centres, strict=True)
  )
  return Scene(objects, layout, int(rng.integers(2**32)))


class Scenes:
  """A split of Scenes as a random-access source.

  Scene `i` depends only on (seed, split, i); a longer source starts with the
  scenes of a shorter one. A content (layout, colours, shapes) belongs to one
  split, whatever the seed, so splits share no content. "val" and "test" have
  no content twice, so no two of their items share a description. "train"
  repeats its contents once all have been used; the images then differ in
  jitter and grain.

  Captions have at most 17 tokens, [CLS] and [SEP] included.

  Args:
    split: "train", "val" or "test".
    size: side of the images in pixels.
    num: number of items; by default 8,000 for "train" and 1,000 for the
      held-out splits.
    seed: of the contents, their order and their images.
    noise: share of captions replaced by junk: "swap" (a caption of another
      image of this split that is incorrect here), "boilerplate", "file_name".
      Images and other captions do not change.
    junk: the mix of junk: "plain", or "web" for junk as in web data, most of
      it "near_miss" (one colour, one shape or the order is wrong) or "vague"
      (incomplete), and the rest as above.
    counts: shares of scenes with one, two and three objects.
    with_captions: whether records have captions; without them they only have
      the image and its ids.
    with_questions: whether records have a question each, and its answer.
      Scenes then have two objects, or one to three if these are counted, and
      contents of held-out splits may occur twice.

  Raises:
    ValueError: `split` or `junk` is unknown, `noise` is not in [0, 1], or
      `num` is too small, or larger than the number of distinct contents of a
      held-out split.
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
    with_questions: bool = False,
  ):
    if split not in SPLITS:
      raise ValueError(
        f"Scenes: expected one of the splits {list(SPLITS)}, found {split!r}"
      )
    if not 0 <= noise <= 1:
      raise ValueError(
        f"Scenes {split}, ?noise=: expected a share in [0, 1], found {noise}"
      )
    if junk not in junk_lib.MIXES:
      raise ValueError(
        f"Scenes {split}, ?junk=: expected one of {list(junk_lib.MIXES)}, "
        f"found {junk!r}"
      )
    num = DEFAULT_NUM[split] if num is None else num
    if num < (2 if noise else 1):
      raise ValueError(
        f"Scenes {split}, ?num=: expected at least 1, and at least 2 with "
        f"noise (captions are swapped between images), found {num}"
      )
    self.split, self.size, self.seed = split, size, seed
    self.noise, self._kinds = noise, junk_lib.MIXES[junk]
    self._with_captions = with_captions
    self._with_questions = with_questions
    self._counts, self._numbers = self._plan(num, counts)

  def _plan(
    self, num: int, counts: Sequence[float]
  ) -> tuple[Int8[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """Returns the number of objects and the content number of every item."""
    # A golden ratio sequence instead of random numbers, so that every range of
    # items has the right shares.
    turns = np.arange(num) * ((math.sqrt(5) - 1) / 2)
    share = (turns + self._rng(0, 3).random()) % 1
    edges = np.cumsum(counts)
    item_counts = np.searchsorted(edges / edges[-1], share, side="right") + 1
    may_repeat = self.split == "train" or self._with_questions
    if self._with_questions:
      item_counts = np.array([asking.num_objects(n) for n in range(num)])
    numbers = np.zeros(num, np.int64)
    for count in LAYOUTS:
      items = np.flatnonzero(item_counts == count)
      if not items.size:
        continue
      contents = _contents_of(self.split, count, self.seed)
      if not may_repeat and items.size > contents.size:
        raise ValueError(
          f"Scenes {self.split}: num={num} with counts={counts} needs "
          f"{items.size} distinct scenes of {count} object(s), found "
          f"{contents.size}; reduce ?num= or change ?counts="
        )
      numbers[items] = contents[np.arange(items.size) % contents.size]
    return item_counts.astype(np.int8), numbers

  def __len__(self) -> int:
    return len(self._numbers)

  def _rng(self, index: int, purpose: int) -> np.random.Generator:
    # One stream per purpose, so that junk does not change the image.
    split = list(SPLITS).index(self.split)
    return np.random.default_rng((self.seed, split, index, purpose))

  def scene(self, index: int) -> Scene:
    """Returns the scene of image `index`."""
    index = range(len(self))[index]
    rng = self._rng(index, 0)
    count = int(self._counts[index])
    return make_scene(count, int(self._numbers[index]), rng)

  def __getitem__(self, index: int) -> dict:
    """Returns the record of item `index`.

    In addition to the usual keys, `noise` is the kind of junk, or "", and
    `references` are all correct captions of the image.
    """
    index = range(len(self))[index]
    scene = self.scene(index)
    record = {
      "image": render(scene, self.size),
      "image_id": index,
      "id": f"scenes/{self.split}:{index}",
    }
    if self._with_questions:
      kind, text, answer = asking.ask(index, scene, self._rng(index, 4))
      return {
        **record,
        "question": text,
        "question_id": index,
        "question_type": kind,
        "answers": [answer],
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
      return self._incorrect_caption(index, rng), kind
    return junk_lib.generate(kind, self.scene(index), rng), kind

  def _incorrect_caption(self, index: int, rng: np.random.Generator) -> str:
    correct = descriptions(self.scene(index))
    # In "train" another image may have the same content.
    while (caption := self._random_caption(rng)) in correct:
      pass
    return caption

  def _random_caption(self, rng: np.random.Generator) -> str:
    return describe(self.scene(int(rng.integers(len(self)))), rng)
