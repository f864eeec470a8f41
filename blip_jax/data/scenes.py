"""Scenes: rendered pictures with known truth, for runs that download nothing.

A scene is one to three shapes on quiet paper. What is in it (`Scene`), how it
looks (`render`) and what may be said of it (`describe`, `descriptions`) are
kept apart, so that a question or a statement about two pictures is one more
function of the same `Scene`.

The defaults are chosen so that a model of about a million parameters learns
to retrieve and to caption within minutes on a CPU: shapes as large as the
layout allows, little jitter, weak grain, objects mostly named in reading
order, and sizes named only where they differ. Geometry matters most: with
small and scattered shapes, colours are learnt and shapes are not.

Train on Scenes without flips and without crops: "left" would become untrue.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Int8, Int64, UInt8, UInt64

COLOURS = {
  "red": (214, 32, 38),
  "orange": (245, 134, 16),
  "yellow": (247, 220, 40),
  "green": (38, 150, 62),
  "cyan": (48, 205, 220),
  "blue": (36, 74, 204),
  "purple": (132, 46, 168),
  "pink": (246, 140, 190),
  "brown": (122, 74, 38),
  "black": (28, 28, 32),
}


def _star(corners: int, inner: float = 1.0) -> np.ndarray:
  """Polygon with a corner on top and every second one at radius `inner`."""
  angle = np.arange(corners) * (2 * math.pi / corners) - math.pi / 2
  radius = np.where(np.arange(corners) % 2, inner, 1.0)
  return np.stack([np.cos(angle), np.sin(angle)], -1) * radius[:, None]


def _cross(arm: float) -> np.ndarray:
  corner = np.array([(arm, -1), (arm, -arm), (1, -arm)])
  turn = np.array([(0, 1), (-1, 0)])
  turns = [np.linalg.matrix_power(turn, k) for k in range(4)]
  return np.concatenate([corner @ turn for turn in turns])


def _heart() -> np.ndarray:
  t = np.linspace(0, 2 * math.pi, 64, endpoint=False)
  x = 16 * np.sin(t) ** 3
  y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
  return np.stack([x, -y - 2.5], -1) / 15


# Contours around (0, 0), y downwards, scaled to look about equally large. A
# second contour cuts a hole.
SHAPES = {
  "circle": (_star(64),),
  "square": (np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.88,),
  "triangle": (np.array([(0, -1), (1.1, 0.9), (-1.1, 0.9)]),),
  "diamond": (_star(4) * (0.85, 1.15),),
  "cross": (_cross(0.36),),
  "star": (_star(10, 0.45) * 1.15 + (0, 0.1),),
  "heart": (_heart(),),
  "ring": (_star(64), _star(64) * 0.52),
}

KINDS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)

# Share of all scenes, in percent [from, to), by a hash of what is in them.
SPLITS = {"train": (0, 70), "val": (70, 85), "test": (85, 100)}
DEFAULT_NUM = {"train": 8000, "val": 1000, "test": 1000}

# Centres in fractions of the side, objects in reading order.
_NEAR, _MID, _FAR = 0.25, 0.5, 0.75
LAYOUTS = {
  1: {
    "middle": ((_MID, _MID),),
    "left": ((_NEAR, _MID),),
    "right": ((_FAR, _MID),),
    "top": ((_MID, _NEAR),),
    "bottom": ((_MID, _FAR),),
  },
  2: {
    "row": ((_NEAR, _MID), (_FAR, _MID)),
    "column": ((_MID, _NEAR), (_MID, _FAR)),
  },
  3: {
    "row": ((0.18, _MID), (_MID, _MID), (0.82, _MID)),
    "column": ((_MID, 0.18), (_MID, _MID), (_MID, 0.82)),
  },
}
RADIUS = {1: 0.21, 2: 0.21, 3: 0.135}  # of a large object, in sides
SMALL = 0.68  # radius of a small object in radii of a large one
JITTER = 0.025  # of a centre, in sides, each way
SIZES_DIFFER = 0.1  # share of pairs with one small and one large object
READING_ORDER = 0.85  # share of captions that name objects in that order

# Every template names every object and where it is: two scenes that differ in
# content share no description, so held-out retrieval has one right answer.
_TEMPLATES = {
  (1, "middle"): ("{0} in the middle", "there is {0} in the middle"),
  (1, "left"): ("{0} on the left", "there is {0} on the left"),
  (1, "right"): ("{0} on the right", "there is {0} on the right"),
  (1, "top"): ("{0} at the top", "there is {0} at the top"),
  (1, "bottom"): ("{0} at the bottom", "there is {0} at the bottom"),
  (2, "row"): (
    "{0} to the left of {1}",
    "{0} on the left and {1} on the right",
    "there is {0} left of {1}",
  ),
  (2, "column"): (
    "{0} above {1}",
    "{0} at the top and {1} at the bottom",
    "there is {0} above {1}",
  ),
  (3, "row"): (
    "{0} and {1} and {2} from left to right",
    "from left to right {0} then {1} then {2}",
  ),
  (3, "column"): (
    "{0} and {1} and {2} from top to bottom",
    "from top to bottom {0} then {1} then {2}",
  ),
}
_REVERSED = {
  (2, "row"): ("{1} to the right of {0}", "there is {1} right of {0}"),
  (2, "column"): ("{1} below {0}", "there is {1} under {0}"),
}

_BOILERPLATE = (
  "Click to enlarge",
  "Image not available",
  "Free shipping on all orders",
  "Sign up for our newsletter",
  "Photo by admin",
  "Stock photo, download now",
  "Page {} of {}",
)
_VAGUE = (
  "a picture",
  "two shapes",
  "shapes on paper",
  "some colored shapes",
  "a drawing of shapes",
  "an object beside another object",
)
_FILE_NAMES = ("IMG_{:04d}.jpg", "DSC{:05d}.JPG", "image-{}.png", "scan {}.tif")
# What stands where a caption should, and how often: junk that is easy to tell,
# or such as the web has, much of which is nearly true.
_JUNK = {
  "plain": ("swap", "swap", "boilerplate", "file_name"),
  "web": (
    *("near_miss",) * 8,
    *("vague",) * 4,
    *("swap",) * 3,
    *("boilerplate",) * 3,
    *("file_name",) * 2,
  ),
}


@dataclasses.dataclass(frozen=True)
class Object:
  """One shape: what it is, and its centre in fractions of the side."""

  shape: str
  colour: str
  size: str  # "small" | "large"
  x: float
  y: float


@dataclasses.dataclass(frozen=True)
class Scene:
  """What a picture shows.

  `objects` are in reading order along `layout`: a place of `LAYOUTS[1]` for
  one object, "row" or "column" for more. `grain` seeds what no caption
  mentions: the tone of the paper, speckle, slight tints.
  """

  objects: tuple[Object, ...]
  layout: str
  grain: int

  @property
  def sizes_differ(self) -> bool:
    """Whether "small" and "large" mean something here: size is relative."""
    return len({thing.size for thing in self.objects}) > 1


def render(scene: Scene, size: int) -> UInt8[np.ndarray, "S S 3"]:
  """Draws `scene` as an RGB picture of `size` pixels a side, antialiased."""
  rng = np.random.default_rng(scene.grain)
  paper = rng.integers(214, 240) + rng.integers(-5, 6, 3)
  tints = rng.integers(-8, 9, (len(scene.objects), 3))
  # Drawn larger and shrunk: OpenCV's own smoothing fattens shapes by about a
  # pixel, which at 32 pixels closes rings and blunts corners.
  grow = max(1, 128 // size)
  side = size * grow
  picture = np.full((side, side, 3), paper, np.uint8)
  for thing, tint in zip(scene.objects, tints, strict=True):
    scale = RADIUS[len(scene.objects)] * (SMALL if thing.size == "small" else 1)
    # Pixel centres are whole numbers to OpenCV; 4 bits are below the pixel.
    contours = [
      np.int32(np.rint(((c * scale + (thing.x, thing.y)) * side - 0.5) * 16))
      for c in SHAPES[thing.shape]
    ]
    rgb = (COLOURS[thing.colour] + tint).clip(0, 255).tolist()
    cv2.fillPoly(picture, contours, rgb, cv2.LINE_AA, shift=4)
  picture = cv2.resize(picture, (size, size), interpolation=cv2.INTER_AREA)
  speckle = rng.integers(-4, 5, picture.shape, dtype=np.int8)
  return (picture + speckle.astype(np.int16)).clip(0, 255).astype(np.uint8)


def _phrase(thing: Object, with_size: bool) -> str:
  words = f"{thing.colour} {thing.shape}"
  if with_size:
    words = f"{thing.size} {words}"
  return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def describe(scene: Scene, rng: np.random.Generator) -> str:
  """One true caption, in lower case and without punctuation."""
  kind = (len(scene.objects), scene.layout)
  with_size = scene.sizes_differ and rng.random() < 0.5
  templates = _TEMPLATES[kind]
  if kind in _REVERSED and rng.random() >= READING_ORDER:
    templates = _REVERSED[kind]
  template = templates[rng.integers(len(templates))]
  return template.format(*(_phrase(o, with_size) for o in scene.objects))


def descriptions(scene: Scene) -> frozenset[str]:
  """All captions that `describe` may give: what counts as exactly right."""
  kind = (len(scene.objects), scene.layout)
  return frozenset(
    template.format(*(_phrase(thing, with_size) for thing in scene.objects))
    for template in (*_TEMPLATES[kind], *_REVERSED.get(kind, ()))
    for with_size in {False, scene.sizes_differ}
  )


def _nearly(scene: Scene, rng: np.random.Generator) -> Scene:
  """A scene that no description of this one is true of, but for a detail."""
  objects, place = list(scene.objects), rng.integers(len(scene.objects))
  change = ("colour", "shape", "order")[rng.integers(3)]
  kinds = [(thing.colour, thing.shape) for thing in objects]
  if change == "order" and len(set(kinds)) > 1:
    # Turned by one: of two, each in the place of the other.
    kinds = kinds[1:] + kinds[:1]
  else:
    change = "colour" if change == "order" else change
    values = [*(COLOURS if change == "colour" else SHAPES)]
    colour, shape = kinds[place]
    values.remove(colour if change == "colour" else shape)
    value = values[rng.integers(len(values))]
    kinds[place] = (value, shape) if change == "colour" else (colour, value)
  return dataclasses.replace(
    scene,
    objects=tuple(
      dataclasses.replace(thing, colour=colour, shape=shape)
      for thing, (colour, shape) in zip(objects, kinds, strict=True)
    ),
  )


def _say_little(scene: Scene, rng: np.random.Generator) -> str:
  """A text that is no description: one object of all, or none."""
  if rng.random() < 0.5:
    return _phrase(scene.objects[rng.integers(len(scene.objects))], False)
  return _VAGUE[rng.integers(len(_VAGUE))]


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
    if junk not in _JUNK:
      raise ValueError(f"Scenes: junk is one of {list(_JUNK)}, found {junk!r}.")
    num = DEFAULT_NUM[split] if num is None else num
    if num < (2 if noise else 1):
      raise ValueError(
        f"Scenes {split}: num={num} is too few; noise needs another picture to"
        " take captions from, so at least 2."
      )
    self.split, self.size, self.seed = split, size, seed
    self.noise, self._kinds = noise, _JUNK[junk]
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
    scene = self.scene(index)
    if kind == "swap":
      return self._untrue_caption(index, rng), kind
    if kind == "near_miss":
      return describe(_nearly(scene, rng), rng), kind
    if kind == "vague":
      return _say_little(scene, rng), kind
    phrases = _BOILERPLATE if kind == "boilerplate" else _FILE_NAMES
    phrase = phrases[rng.integers(len(phrases))]
    return phrase.format(*rng.integers(1, 10_000, 2)), kind

  def _untrue_caption(self, index: int, rng: np.random.Generator) -> str:
    true = descriptions(self.scene(index))
    # In "train" another picture may show the same content.
    while (caption := self._caption_of_any(rng)) in true:
      pass
    return caption

  def _caption_of_any(self, rng: np.random.Generator) -> str:
    return describe(self.scene(int(rng.integers(len(self)))), rng)


def vocab_dir() -> str:
  """Folder with the WordPiece vocabulary (`vocab.txt`) made for Scenes.

  It holds the words of captions, junk, questions and statements, and single
  characters, so that nothing in plain ASCII becomes [UNK].
  """
  return str(pathlib.Path(__file__).with_name("scenes_vocab"))
