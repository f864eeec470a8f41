"""From a line in a config to a source, and from a record to model inputs."""

import ast
import dataclasses
import glob
import inspect
import itertools
import re
import urllib.parse
from collections.abc import Callable
from typing import Any

import numpy as np

from blip_jax.data import scenes, shards, sources, tokenizer, transforms

UNDERSTOOD = """
  path/annotations.json    a list of {image | url, caption, image_id?}
  path/annotations.jsonl   the same, one object per line
  path/*.tar               webdataset or img2dataset shards
  path/{00000..00099}.tar  the same, all of which must exist
  tfds:NAME:SPLIT          a TFDS builder, or the directory of a prepared one;
                           ?caption=FEATURE&image=FEATURE&data_dir=PATH
  scenes:SPLIT             rendered scenes: train, val or test;
                           ?noise=0.3&num=100"""

# Pixels that decoding may produce: beyond this a picture is an attack or a
# scan, and would take gigabytes in every worker.
MAX_PIXELS = 80_000_000


def open_source(spec: str, image_root: str = "") -> Any:
  """Return the source that `spec` names; see `UNDERSTOOD`.

  Args:
    spec: one of the forms of `UNDERSTOOD`. What follows "?" in the last two
      becomes keyword arguments.
    image_root: what relative paths of pictures in annotations start from.

  Raises:
    ValueError: nothing of the kind is understood, or it does not exist.
  """
  kind, _, rest = spec.partition(":")
  if kind == "scenes":
    split, options = _options(rest, scenes.Scenes)
    return scenes.Scenes(split, **options)
  if kind == "tfds":
    address, options = _options(rest, sources.Tfds)
    name, _, split = address.rpartition(":")
    if not name:
      raise ValueError(f"{spec!r}: expected tfds:NAME:SPLIT.")
    return sources.Tfds(name, split, **options)
  if spec.endswith((".json", ".jsonl")):
    return sources.Annotations(spec, image_root)
  if spec.endswith(".tar"):
    return shards.TarShards(expand(spec))
  raise ValueError(f"Unknown data source {spec!r}. Understood: {UNDERSTOOD}")


def open_rotation(pattern: str, image_root: str = "") -> list[Any]:
  """Return the sources of which each epoch uses the next one.

  The paper splits LAION so. The order is that of the sorted names, the same
  on every host: BLIP lists the folder unsorted, and hosts may disagree.
  """
  return [open_source(path, image_root) for path in expand(pattern)]


def expand(pattern: str) -> list[str]:
  """Return the paths that a pattern with {a,b}, {00..99} or * stands for.

  Raises:
    ValueError: a pattern with `*`, `?` or `[` matches no file.
  """
  paths = []
  for path in _braces(pattern):
    found = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
    if not found:
      raise ValueError(f"{path}: no such files.")
    paths.extend(found)
  return paths


def _braces(pattern: str) -> list[str]:
  pieces = re.split(r"\{([^{}]*)\}", pattern)
  # Text and contents of braces take turns.
  choices = [_choices(p) if i % 2 else [p] for i, p in enumerate(pieces)]
  return ["".join(path) for path in itertools.product(*choices)]


def _choices(braces: str) -> list[str]:
  numbers = re.fullmatch(r"(\d+)\.\.(\d+)", braces)
  if not numbers:
    return braces.split(",")
  first, last = numbers.groups()
  return [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]


def _options(text: str, target: Callable) -> tuple[str, dict[str, Any]]:
  """Split "address?key=value&..."; keys must be options of `target`."""
  address, _, query = text.partition("?")
  parameters = inspect.signature(target).parameters.values()
  known = [p.name for p in parameters if p.default is not p.empty]
  options = {}
  for key, value in urllib.parse.parse_qsl(query, strict_parsing=bool(query)):
    if key not in known:
      raise ValueError(f"{text!r}: no option {key!r}; there are {known}.")
    options[key] = _literal(value)
  return address, options


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):  # a word: the value is the text itself
    return text


@dataclasses.dataclass(frozen=True)
class PretrainExample:
  """Turn a record into an image and its tokens, as pre-training reads them.

  Of several captions one is drawn at each visit: a set with five captions per
  picture counts each picture once per epoch, while a row per caption (as in
  BLIP's files) counts it five times.

  Attributes:
    image: brings a decoded picture to the model's size.
    max_words: captions are cut to so many words before they are tokenised.
    max_length: tokens, special ones and padding included.
  """

  tokenizer: tokenizer.Tokenizer
  image: transforms.TrainImage | transforms.EvalImage
  max_words: int = 30
  max_length: int = 30
  max_pixels: int = MAX_PIXELS

  def __call__(
    self, record: sources.Record, rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    caption = record["caption"]
    if isinstance(caption, list):
      caption = caption[rng.integers(len(caption))]
    text = transforms.clean_text(caption)
    text = transforms.pre_caption(text, self.max_words)
    picture = transforms.decode(record["image"], self.max_pixels)
    random = isinstance(self.image, transforms.TrainImage)
    picture = self.image(picture, rng) if random else self.image(picture)
    ids, mask = self.tokenizer.encode([text], self.max_length)
    return {
      "image": picture,
      "input_ids": ids[0],
      "attention_mask": mask[0],
    }
