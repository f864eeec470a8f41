"""FLOPs of the reference algorithm: what MFU is computed on.

A multiplication with an addition counts twice, as usual; attention's two
products count, softmax, LayerNorm and GELU do not. Pre-training is the
original's: each of its four passes of texts with images projects the image
anew. Decoding and matching keep keys and values of an image, once per image.

However a program gets its results, these are the numbers it is measured by.
"""

from blip_jax.models import config as model_config


def image(c: model_config.ViTConfig) -> int:
  """Of encoding an image."""
  n, w = c.num_tokens, c.width
  patches = 2 * (n - 1) * 3 * c.patch_size**2 * w
  layer = 2 * n * (4 * w * w) + 4 * n * n * w + 4 * n * w * c.mlp_dim
  return patches + c.depth * layer


def image_kv(c: model_config.BlipConfig) -> int:
  """Of projecting an image for the cross-attention of all layers."""
  return c.med.depth * 4 * c.vit.num_tokens * c.vit.width * c.med.width


def text(
  c: model_config.BlipConfig, length: int, crossed: int = 0, seen: int = 0
) -> int:
  """Of a text tower's layers.

  Args:
    c: sizes.
    length: tokens that are processed.
    crossed: tokens of the image or the question that they attend to, whose
      projection is not counted.
    seen: tokens that each attends to; by default those of the text.
  """
  w, tokens = c.med.width, seen or length
  layer = 8 * length * w * w + 4 * length * tokens * w
  layer += 4 * length * w * c.med.mlp_dim
  if crossed:
    layer += 4 * length * w * w + 4 * length * crossed * w
  return c.med.depth * layer


def head(c: model_config.BlipConfig, length: int) -> int:
  """Of the logits of some tokens."""
  return 2 * length * c.med.width * (c.med.width + c.med.vocab_size)


def pretraining(
  c: model_config.BlipConfig, length: int, queue_size: int
) -> int:
  """Of a step, per example.

  Three times the forward pass of what is trained (a gradient costs two), and
  the momentum encoders.
  """
  vit, unimodal = image(c.vit), text(c, length)
  pair = text(c, length, crossed=c.vit.num_tokens) + image_kv(c)
  projections = 2 * (c.vit.width + c.med.width) * c.embed_dim
  # One for the ITM positives, two for its negatives, one for LM.
  trained = vit + unimodal + 4 * pair + head(c, length) + projections
  # Online and momentum similarities of both directions, and the gradient of the
  # former with respect to the features.
  queues = (4 + 2) * 2 * c.embed_dim * queue_size
  return 3 * trained + vit + unimodal + queues


def captioning(c: model_config.BlipConfig, length: int, num_texts: int) -> int:
  """Of an image's captions of `length` tokens, the prompt included, in beams or
  samples that are decoded token by token."""
  decoded = decoding(c, length, c.vit.num_tokens)
  return image(c.vit) + image_kv(c) + num_texts * decoded


def answering(
  c: model_config.BlipConfig, question: int, length: int, num_texts: int
) -> int:
  """Of a question of some tokens about an image, and of answers of `length`
  tokens, the first one included, that are decoded token by token."""
  read = text(c, question, crossed=c.vit.num_tokens)
  question_kv = c.med.depth * 4 * question * c.med.width * c.med.width
  decoded = decoding(c, length, question)
  return image(c.vit) + image_kv(c) + read + question_kv + num_texts * decoded


def decoding(c: model_config.BlipConfig, length: int, crossed: int) -> int:
  """Of a text of `length` tokens; `crossed` as for `text`."""
  return sum(
    text(c, 1, crossed, seen) + head(c, 1) for seen in range(1, length)
  )


def filtering(c: model_config.BlipConfig, length: int, num_texts: int) -> int:
  """Of an image that is matched with some texts."""
  return image(c.vit) + ranking(c, length, num_texts) * num_texts


def ranking(c: model_config.BlipConfig, length: int, num_texts: int) -> int:
  """Of one of the texts that are matched with an encoded image."""
  return text(c, length, crossed=c.vit.num_tokens) + image_kv(c) // num_texts
