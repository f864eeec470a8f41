"""From the record of a statement about two images to the arrays of a batch.

Dimensions: H and W image, L text length. Images are uint8 RGB; tokens are
int32.
"""

import dataclasses

import numpy as np

from blip_jax.data import (
  datasets,
  examples,
  sources,
  statements,
  tokenizer,
  transforms,
)


@dataclasses.dataclass(frozen=True)
class StatementExample(examples.Stacked):
  """`image_0` and `image_1` [H, W, 3], the left one first, and the tokens of
  the statement, `input_ids` and `attention_mask` [L].

  Attributes:
    tokenizer: of the model.
    image: resizes a decoded image for the model.
    max_words: statements are truncated to this number of words before they are
      tokenised.
    max_length: length of a statement in tokens, L; special tokens and padding
      included.
    swap: whether to exchange the images of half of the examples, and with them
      the words "left" and "right".
    with_label: whether to add `label` [], int32: 1 if the statement is true.
    max_pixels: stored images with more pixels are bad samples.
  """

  tokenizer: tokenizer.Tokenizer
  image: examples.ImageTransform
  max_words: int = 40
  max_length: int = 64
  swap: bool = False
  with_label: bool = True
  max_pixels: int = transforms.MAX_PIXELS

  open_source = staticmethod(datasets.open_statements)

  def __call__(
    self, record: sources.Record, rng: np.random.Generator
  ) -> examples.Arrays:
    statement = statements.cleaned(record["statement"], self.max_words)
    if self.with_label and "label" not in record:
      raise transforms.BadSample("no_label", repr(statement[:60]))
    images = record["images"]
    if self.swap and rng.random() < 0.5:
      images, statement = images[::-1], statements.mirrored(statement)
    ids, mask = self.tokenizer.encode([statement], self.max_length)
    example = {
      name: examples.pixels(image, self.image, self.max_pixels, rng)
      for name, image in zip(statements.PAIR, images, strict=True)
    }
    example |= {"input_ids": ids[0], "attention_mask": mask[0]}
    if self.with_label:
      example["label"] = np.array(record["label"], np.int32)
    return example

  def blank(self) -> examples.Arrays:
    black, zeros = examples.black(self.image), np.zeros(self.max_length)
    example = {name: black for name in statements.PAIR}
    for name in ("input_ids", "attention_mask"):
      example[name] = zeros.astype(np.int32)
    if self.with_label:
      example["label"] = np.array(0, np.int32)
    return example
