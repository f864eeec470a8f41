"""From a record to the arrays of an example, and from examples to a batch.

Dimensions: H, W image, L text length.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from blip_jax.data import sources, tokenizer, transforms

Arrays = dict[str, np.ndarray]
# Brings a decoded image to the model's size, with augmentation or without.
ImageTransform = transforms.TrainImage | transforms.EvalImage


@runtime_checkable
class Example(Protocol):
  """What the loaders ask of a kind of examples.

  Examples may be ragged: an example is whatever its own `collate` understands,
  such as a question with several weighted answers. Only a batch has to have
  the same shapes every time.
  """

  def __call__(
    self, record: sources.Record, rng: np.random.Generator
  ) -> dict[str, Any]:
    """Returns the example of a record; a function of both arguments alone.

    Raises:
      transforms.BadSample: the record cannot be used.
    """
    ...

  def blank(self) -> dict[str, Any]:
    """Returns what stands for a record that cannot be used."""
    ...

  def collate(self, examples: Sequence[Mapping[str, Any]]) -> Arrays:
    """Returns a batch."""
    ...


class Stacked:
  """Examples of the same shapes, which a batch stacks."""

  def collate(self, examples: Sequence[Mapping[str, Any]]) -> Arrays:
    return {
      key: np.stack([example[key] for example in examples])
      for key in examples[0]
    }


@dataclasses.dataclass(frozen=True)
class PairExample(Stacked):
  """An image and the tokens of its caption.

  Of several captions, each visit samples one: a data set with five captions
  for each image counts each image once per epoch, while a row for each caption
  (as in BLIP's files) counts it five times.

  Attributes:
    tokenizer: of the model.
    image: brings a decoded image to the model's size.
    max_words: to which a caption is cut before it is tokenised.
    max_length: tokens, special ones and padding included.
    max_pixels: of an image as it is stored.
    prompt: what every text starts with, before its caption.
    with_image_id: whether to add `image_id`, a number that captions of one
      image share.
  """

  tokenizer: tokenizer.Tokenizer
  image: ImageTransform
  max_words: int = 30
  max_length: int = 30
  max_pixels: int = transforms.MAX_PIXELS
  prompt: str = ""
  with_image_id: bool = False

  def __call__(
    self, record: sources.Record, rng: np.random.Generator
  ) -> Arrays:
    caption = record["caption"]
    if isinstance(caption, list):
      caption = caption[rng.integers(len(caption))]
    text = transforms.clean_text(caption)
    text = self.prompt + transforms.pre_caption(text, self.max_words)
    image = transforms.decode(record["image"], self.max_pixels)
    if isinstance(self.image, transforms.TrainImage):
      pixels = self.image(image, rng)
    else:
      pixels = self.image(image)
    example = {"image": pixels} | _tokens(self.tokenizer, text, self.max_length)
    if self.with_image_id:
      example["image_id"] = np.array(sources.image_number(record), np.int32)
    return example

  def blank(self) -> Arrays:
    example = {"image": _black(self.image)} | _no_tokens(self.max_length)
    if self.with_image_id:
      example["image_id"] = np.array(0, np.int32)
    return example


@dataclasses.dataclass(frozen=True)
class ImageExample(Stacked):
  """The image of a record alone.

  Attributes:
    image: brings a decoded image to the model's size.
    max_pixels: of an image as it is stored.
    num_frames: sampled from each video; 0 if records have images.
  """

  image: transforms.EvalImage
  max_pixels: int = transforms.MAX_PIXELS
  num_frames: int = 0

  def __call__(
    self, record: sources.Record, rng: np.random.Generator
  ) -> Arrays:
    if self.num_frames:
      # Needs an extra of the package.
      from blip_jax.data import video

      size = self.image.size
      return {"image": video.read(record["image"], self.num_frames, size)}
    image = transforms.decode(record["image"], self.max_pixels)
    return {"image": self.image(image)}

  def blank(self) -> Arrays:
    black = _black(self.image)
    if self.num_frames:
      black = np.stack([black] * self.num_frames)
    return {"image": black}


@dataclasses.dataclass(frozen=True)
class TextExample(Stacked):
  """The tokens of a record's caption alone."""

  tokenizer: tokenizer.Tokenizer
  max_words: int
  max_length: int

  def __call__(
    self, record: sources.Record, rng: np.random.Generator
  ) -> Arrays:
    text = transforms.clean_text(record["caption"])
    text = transforms.pre_caption(text, self.max_words)
    return _tokens(self.tokenizer, text, self.max_length)

  def blank(self) -> Arrays:
    return _no_tokens(self.max_length)


@dataclasses.dataclass(frozen=True)
class ImagesExample(Stacked):
  """The image of a record in the sizes of several models.

  Attributes:
    images: name of the model -> brings a decoded image to its size.
  """

  images: Mapping[str, transforms.EvalImage]

  def __call__(
    self, record: sources.Record, rng: np.random.Generator
  ) -> Arrays:
    decoded = transforms.decode(record["image"], transforms.MAX_PIXELS)
    # Models of the same size share the pixels.
    pixels = {image: image(decoded) for image in set(self.images.values())}
    return {name: pixels[image] for name, image in self.images.items()}

  def blank(self) -> Arrays:
    return {name: _black(image) for name, image in self.images.items()}


def _tokens(
  text_tokenizer: tokenizer.Tokenizer, text: str, max_length: int
) -> Arrays:
  ids, mask = text_tokenizer.encode([text], max_length)
  return {"input_ids": ids[0], "attention_mask": mask[0]}


def _no_tokens(max_length: int) -> Arrays:
  zeros = np.zeros(max_length, np.int32)
  return {"input_ids": zeros, "attention_mask": zeros}


def _black(image: ImageTransform) -> np.ndarray:
  size = image.size
  height, width = (size, size) if isinstance(size, int) else size
  return np.zeros((height, width, 3), np.uint8)
