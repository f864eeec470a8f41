"""From a record to an example, and from examples to the arrays of a batch.

Dimensions: B batch, F frames, H and W image, L text length. Images are uint8
RGB; tokens are int32.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from blip_jax.data import datasets, sources, tokenizer, transforms

Arrays = dict[str, np.ndarray]
# Resizes a decoded image for the model, with or without augmentation.
ImageTransform = transforms.TrainImage | transforms.EvalImage


@runtime_checkable
class Example(Protocol):
  """A kind of examples, as the loaders use it.

  Examples may be ragged, such as a question with a varying number of weighted
  answers: only `collate` looks into them. A batch must have the same shapes
  every time, because each new shape compiles the training step again.
  """

  def open_source(self, spec: str, image_root: str = "") -> Any:
    """Opens a source of records that examples can be made of; see `datasets`.

    Raises:
      ValueError: there is no such source, or it lacks what examples need.
    """
    ...

  def __call__(
    self, record: sources.Record, rng: np.random.Generator
  ) -> dict[str, Any]:
    """Returns the example of a record; depends on its arguments alone.

    Raises:
      transforms.BadSample: the record cannot be used.
    """
    ...

  def blank(self) -> dict[str, Any]:
    """Returns a placeholder for a record that cannot be used."""
    ...

  def collate(self, examples: Sequence[Mapping[str, Any]]) -> Arrays:
    """Returns the batch of some examples, the same number every time."""
    ...


class Stacked:
  """A kind of examples whose arrays have fixed shapes; a batch stacks them."""

  open_source = staticmethod(datasets.open_source)

  def collate(self, examples: Sequence[Mapping[str, Any]]) -> Arrays:
    return {
      key: np.stack([example[key] for example in examples])
      for key in examples[0]
    }


@dataclasses.dataclass(frozen=True)
class PairExample(Stacked):
  """`image` [H, W, 3] and the tokens of its caption.

  The tokens are `input_ids` and `attention_mask` [L]. If a record has more
  than one usable caption, each visit samples one. A row with five captions thus
  counts once per epoch; five rows with one caption each (as in BLIP's files)
  count five times.

  Attributes:
    tokenizer: of the model.
    image: resizes a decoded image for the model.
    max_words: captions are truncated to this number of words before they are
      tokenised.
    max_length: length of a text in tokens, L; special tokens and padding
      included.
    max_pixels: stored images with more pixels are bad samples.
    prompt: prefix of every text.
    with_image_id: whether to add `image_id` [], a number that all captions of
      an image share.
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
      usable, bad = sources.usable_captions(record)
      if not usable:
        raise transforms.BadSample(bad[0].reason, bad[0].detail)
      caption = usable[rng.integers(len(usable))]
    text = transforms.clean_text(caption)
    text = self.prompt + transforms.pre_caption(text, self.max_words)
    image = pixels(record["image"], self.image, self.max_pixels, rng)
    example = {"image": image} | _tokens(self.tokenizer, text, self.max_length)
    if self.with_image_id:
      example["image_id"] = np.array(sources.image_number(record), np.int32)
    return example

  def blank(self) -> Arrays:
    example = {"image": black(self.image)} | _no_tokens(self.max_length)
    if self.with_image_id:
      example["image_id"] = np.array(0, np.int32)
    return example


@dataclasses.dataclass(frozen=True)
class ImageExample(Stacked):
  """`image` of a record: [H, W, 3], or [F, H, W, 3] for videos.

  Attributes:
    image: resizes a decoded image for the model.
    max_pixels: stored images with more pixels are bad samples.
    num_frames: frames to sample from each video; 0 if records have images.
  """

  image: transforms.EvalImage
  max_pixels: int = transforms.MAX_PIXELS
  num_frames: int = 0

  def __call__(
    self, record: sources.Record, rng: np.random.Generator
  ) -> Arrays:
    image = pixels(
      record["image"], self.image, self.max_pixels, rng, self.num_frames
    )
    return {"image": image}

  def blank(self) -> Arrays:
    return {"image": black(self.image, self.num_frames)}


@dataclasses.dataclass(frozen=True)
class TextExample(Stacked):
  """The tokens of a caption: `input_ids` and `attention_mask` [L].

  Attributes:
    tokenizer: of the model.
    max_words: captions are truncated to this number of words before they are
      tokenised.
    max_length: length of a text in tokens, L; special tokens and padding
      included.
  """

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


def _tokens(
  text_tokenizer: tokenizer.Tokenizer, text: str, max_length: int
) -> Arrays:
  ids, mask = text_tokenizer.encode([text], max_length)
  return {"input_ids": ids[0], "attention_mask": mask[0]}


def _no_tokens(max_length: int) -> Arrays:
  zeros = np.zeros(max_length, np.int32)
  return {"input_ids": zeros, "attention_mask": zeros}


def pixels(
  image: Any,
  transform: ImageTransform,
  max_pixels: int,
  rng: np.random.Generator,
  num_frames: int = 0,
) -> np.ndarray:
  """Decodes the image of a record, and brings it to the model's size.

  Args:
    num_frames: frames to take of a video, which are not augmented; 0: it is an
      image.

  Raises:
    BadSample: it cannot be decoded, or has more than `max_pixels` pixels.
  """
  if num_frames:
    # Imported here because it needs the extra [video].
    from blip_jax.data import video

    return video.read(image, num_frames, transform.size)
  if isinstance(transform, transforms.TrainImage):
    with transforms.decoded(image, max_pixels) as decoded:
      return transform(decoded, rng)
  (resized,) = transforms.resized(image, [transform], max_pixels)
  return resized


def black(image: ImageTransform, num_frames: int = 0) -> np.ndarray:
  """Returns the pixels that stand for an image, or a video, that cannot be
  used."""
  size = image.size
  height, width = (size, size) if isinstance(size, int) else size
  frames = (num_frames,) if num_frames else ()
  return np.zeros((*frames, height, width, 3), np.uint8)
