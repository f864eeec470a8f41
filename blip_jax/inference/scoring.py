"""Scores of pairs of pictures and texts, each picture projected once.

Keys and values of a picture cost several times as much as a text that looks at
them, so pairs are taken picture by picture, some texts at a time.

Dimensions: I pictures at a time, M texts, L text length, C joint embedding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int

from blip_jax.models import config as model_config
from blip_jax.models import med
from blip_jax.runtime import sharding

# Texts that look at a picture at once, at most.
TEXTS_AT_ONCE = 16
# Texts are cut behind their last token, to a multiple of so many: few programs
# serve all lengths, and most captions are a third of the longest.
TOKENS = 8
# What a block of pictures may take of a device, beside the parameters.
BLOCK_BYTES = 1 << 30


class Texts(NamedTuple):
  """Tokenised texts on the host."""

  input_ids: Int[np.ndarray, "M L"]
  attention_mask: Int[np.ndarray, "M L"]

  @property
  def lengths(self) -> Int[np.ndarray, " M"]:
    return self.attention_mask.sum(axis=1)

  def rows(self, index: Int[np.ndarray, " n"], length: int) -> dict:
    """A batch of some of them, `length` tokens of each."""
    return {
      "input_ids": self.input_ids[index, :length],
      "attention_mask": self.attention_mask[index, :length],
    }


class Scorer:
  """Programs of a model that has ITC and ITM; each shape is compiled once.

  Attributes:
    image_features: of parameters and pixels; see `tasks.align.predict_fns`.
    text_feat: of parameters, ids and mask.
  """

  def __init__(
    self, predict_fns: Mapping[str, Callable], mesh: jax.sharding.Mesh
  ):
    self._mesh = mesh
    self.image_features = jax.jit(predict_fns["image_features"])
    self.text_feat = jax.jit(predict_fns["text_feat"])
    self._image_kv = jax.jit(predict_fns["image_kv"])

    def look(params, ids, mask, image_kv, legacy_cls):
      logits = predict_fns["match"](
        params, ids, mask, image_kv, legacy_cls=legacy_cls
      )
      return nn.with_logical_constraint(logits, ("batch", None))

    self._look = jax.jit(look, static_argnames="legacy_cls")

  def itm_logits(
    self,
    params: med.Params,
    image_embeds: Float[Array, "I N D"],
    texts: Texts,
    wanted: Sequence[Int[np.ndarray, "_"]],
    legacy_cls: bool = False,
  ) -> list[Float[np.ndarray, "_ 2"]]:
    """ITM logits of pictures with those texts that are wanted of each.

    Args:
      image_embeds: of the pictures of all processes, on the mesh.
      texts: the same on every process.
      wanted: rows of `texts`, for each picture of this process.
      legacy_cls: see `models.blip.Blip.fuse`.
    """
    index, order = _in_rounds(wanted, texts.lengths, self._mesh)
    ends = _agreed(texts.lengths[index].max(axis=(0, 2)), self._mesh)
    with sharding.activate(self._mesh):
      image_kv = self._image_kv(params, image_embeds)
      found = []
      for number, end in enumerate(ends):
        length = min(_whole(int(end), TOKENS), texts.input_ids.shape[1])
        batch = texts.rows(index[:, number].reshape(-1), length)
        batch = sharding.put_batch(batch, self._mesh)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        found.append(
          self._look(params, ids, mask, image_kv, legacy_cls=legacy_cls)
        )
    rounds = [sharding.local_rows(x).reshape(len(wanted), -1, 2) for x in found]
    logits = np.concatenate([np.empty((len(wanted), 0, 2)), *rounds], axis=1)
    logits = logits.astype(np.float32)
    return [
      own[np.argsort(places)] for own, places in zip(logits, order, strict=True)
    ]


def _in_rounds(
  wanted: Sequence[Int[np.ndarray, "_"]],
  lengths: Int[np.ndarray, " M"],
  mesh: jax.sharding.Mesh,
) -> tuple[Int[np.ndarray, "I R m"], list[Int[np.ndarray, "_"]]]:
  """Texts of each picture by R rounds of m, the short ones first.

  Returns:
    Rows of texts, filled up with short ones; how the wanted were ordered.
  """
  most = int(_agreed(np.array(max(map(len, wanted), default=0)), mesh))
  width = min(1 << max(most - 1, 0).bit_length(), TEXTS_AT_ONCE)
  order = [np.argsort(lengths[rows], kind="stable") for rows in wanted]
  index = np.full((len(wanted), _whole(most, width)), lengths.argmin())
  for row, rows, places in zip(index, wanted, order, strict=True):
    row[: len(rows)] = rows[places]
  return index.reshape(len(wanted), -1, width), order


def _agreed(x: np.ndarray, mesh: jax.sharding.Mesh) -> np.ndarray:
  """The largest of all processes, which have to run the same programs."""
  if sharding.num_processes(mesh) == 1:
    return x
  return multihost_utils.process_allgather(x).max(axis=0)


def _whole(number: int, unit: int) -> int:
  return -(-number // unit) * unit


def trimmed(texts: Texts) -> Texts:
  """Without the columns that are padding in all of them."""
  length = _whole(int(texts.lengths.max()), TOKENS)
  return Texts(texts.input_ids[:, :length], texts.attention_mask[:, :length])


def image_bytes(
  config: model_config.BlipConfig, length: int, num_frames: int = 1
) -> int:
  """What a picture in a block takes of a device, at most, while it is encoded
  or while `TEXTS_AT_ONCE` texts of `length` tokens look at it."""
  vit, text = config.vit, config.med
  size = np.dtype(vit.dtype).itemsize
  tokens = num_frames * vit.num_tokens
  kept = tokens * size * (vit.width + 2 * text.depth * text.width)
  # Of a token, hidden layers, and attention weights in float32.
  hidden = lambda tower: size * (tower.mlp_dim + 4 * tower.width)
  weights = lambda tower, keys: 4 * tower.num_heads * keys
  encoding = tokens * (hidden(vit) + weights(vit, vit.num_tokens))
  looking = TEXTS_AT_ONCE * length * (hidden(text) + weights(text, tokens))
  # Twice: an operation's input, and its output.
  return kept + 2 * max(encoding, looking)


def block_size(
  config: model_config.BlipConfig,
  mesh: jax.sharding.Mesh,
  length: int,
  num_frames: int = 1,
) -> int:
  """Pictures of all devices together that fit in `BLOCK_BYTES` on each."""
  of_device = BLOCK_BYTES // image_bytes(config, length, num_frames)
  return max(of_device, 1) * sharding.num_data_shards(mesh)
