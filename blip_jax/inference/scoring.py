"""ITM logits of image-text pairs, with each image projected once.

The cross-attention keys and values of an image cost several times as much as a
text that attends to them. So pairs are grouped by image: each image is
projected once, and its texts are scored a few at a time.

Dimensions: I images at a time, M texts, L text length, C joint embedding.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax.linen import spmd
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int

from blip_jax.models import config as model_config
from blip_jax.models import med
from blip_jax.runtime import sharding

# Texts scored with an image at once, at most.
TEXTS_AT_ONCE = 16
# Texts are trimmed to the longest of the batch, rounded up to a multiple of
# this: few programs serve all lengths, and most captions are a third of the
# longest.
TOKENS = 8
# Device memory for a block of images, in addition to the parameters.
BLOCK_BYTES = 1 << 30


class Texts(NamedTuple):
  """Tokenised texts on the host."""

  input_ids: Int[np.ndarray, "M L"]
  attention_mask: Int[np.ndarray, "M L"]

  @property
  def lengths(self) -> Int[np.ndarray, " M"]:
    return self.attention_mask.sum(axis=1)

  def rows(
    self, index: Int[np.ndarray, " n"], length: int
  ) -> dict[str, np.ndarray]:
    """A batch of some of the texts, trimmed to `length` tokens."""
    return {
      "input_ids": self.input_ids[index, :length],
      "attention_mask": self.attention_mask[index, :length],
    }


class Scorer:
  """Jitted functions of a model that has ITC and ITM.

  Attributes:
    image_features: (params, pixels) -> image embeddings [I, N, D] and unit
      vectors [I, C]; see `tasks.align.predict_fns`.
    text_feat: (params, ids, mask) -> unit vectors [M, C].
    image_kv: (params, image embeddings) -> keys and values of all layers.
    match: (params, ids, mask, image_kv, legacy_cls) -> logits [M, 2].
  """

  def __init__(
    self, predict_fns: Mapping[str, Callable], mesh: jax.sharding.Mesh
  ):
    self._mesh = mesh
    self.image_features = jax.jit(predict_fns["image_features"])
    self.text_feat = jax.jit(predict_fns["text_feat"])
    self.image_kv = jax.jit(predict_fns["image_kv"])

    def match(params, ids, mask, image_kv, legacy_cls):
      logits = predict_fns["match"](
        params, ids, mask, image_kv, legacy_cls=legacy_cls
      )
      return spmd.with_logical_constraint(logits, ("batch", None))

    self.match = jax.jit(match, static_argnames="legacy_cls")

  def itm_logits(self, *args, **kwargs) -> list[Float[np.ndarray, "_ 2"]]:
    """Like `start_itm_logits`, but waits for the logits and returns them."""
    return self.start_itm_logits(*args, **kwargs)()

  def start_itm_logits(
    self,
    params: med.Params,
    image_embeds: Float[Array, "I N D"],
    texts: Texts,
    candidates: Sequence[Int[np.ndarray, "_"]],
    legacy_cls: bool = False,
  ) -> Callable[[], list[Float[np.ndarray, "_ 2"]]]:
    """Starts to compute ITM logits of each image with its candidate texts.

    Args:
      params: of the model, on the mesh.
      image_embeds: of the images of all processes, on the mesh.
      texts: the same on every process.
      candidates: rows of `texts`, for each image of this process.
      legacy_cls: see `models.blip.Blip.fuse`.

    Returns:
      A function that waits for the devices, and returns logits (no match,
      match) of the candidates, for each image of this process.
    """
    index, order = _in_rounds(candidates, texts.lengths, self._mesh)
    ends = _max_of_processes(texts.lengths[index].max(axis=(0, 2)), self._mesh)
    with sharding.activate(self._mesh):
      image_kv = self.image_kv(params, image_embeds)
      rounds = []
      for number, end in enumerate(ends):
        length = min(_round_up(int(end), TOKENS), texts.input_ids.shape[1])
        batch = texts.rows(index[:, number].reshape(-1), length)
        batch = sharding.put_batch(batch, self._mesh)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        rounds.append(
          self.match(params, ids, mask, image_kv, legacy_cls=legacy_cls)
        )
    rows = sharding.rows_later(rounds)
    return lambda: _in_order(rows(), order)


def _in_order(
  rounds: Sequence[Float[np.ndarray, "_ 2"]],
  order: Sequence[Int[np.ndarray, "_"]],
) -> list[Float[np.ndarray, "_ 2"]]:
  """Undoes `_in_rounds`: the logits of each image's candidates."""
  num_images = len(order)
  rounds = [x.reshape(num_images, -1, 2) for x in rounds]
  logits = np.concatenate([np.empty((num_images, 0, 2)), *rounds], axis=1)
  logits = logits.astype(np.float32)
  return [
    image_logits[np.argsort(places)]
    for image_logits, places in zip(logits, order, strict=True)
  ]


def _in_rounds(
  candidates: Sequence[Int[np.ndarray, "_"]],
  lengths: Int[np.ndarray, " M"],
  mesh: jax.sharding.Mesh,
) -> tuple[Int[np.ndarray, "I R m"], list[Int[np.ndarray, "_"]]]:
  """Candidates of each image in R rounds of m, short texts first.

  Returns:
    Rows of texts, padded with the shortest text; and for each image, the order
    into which its candidates were sorted.
  """
  most = np.array(max(map(len, candidates), default=0))
  most = int(_max_of_processes(most, mesh))
  width = min(1 << max(most - 1, 0).bit_length(), TEXTS_AT_ONCE)
  order = [np.argsort(lengths[rows], kind="stable") for rows in candidates]
  index = np.full((len(candidates), _round_up(most, width)), lengths.argmin())
  for padded, rows, places in zip(index, candidates, order, strict=True):
    padded[: len(rows)] = rows[places]
  return index.reshape(len(candidates), -1, width), order


def _max_of_processes(x: np.ndarray, mesh: jax.sharding.Mesh) -> np.ndarray:
  """The maximum over processes, which must all run the same programs."""
  if sharding.num_processes(mesh) == 1:
    return x
  return multihost_utils.process_allgather(x).max(axis=0)


def _round_up(number: int, multiple: int) -> int:
  return -(-number // multiple) * multiple


def trimmed(texts: Texts) -> Texts:
  """Removes the columns that are padding in all texts (up to `TOKENS`)."""
  length = _round_up(int(texts.lengths.max()), TOKENS)
  return Texts(texts.input_ids[:, :length], texts.attention_mask[:, :length])


def image_bytes(
  config: model_config.BlipConfig, length: int, num_frames: int = 1
) -> int:
  """Peak device memory per image of a block.

  That is the larger of two peaks: while the image is encoded, and while
  `TEXTS_AT_ONCE` texts of `length` tokens attend to it.
  """
  vit, text = config.vit, config.med
  size = np.dtype(vit.dtype).itemsize
  tokens = num_frames * vit.num_tokens
  # Embeddings, and keys and values of all layers.
  stored = tokens * size * (vit.width + 2 * text.depth * text.width)

  # Per token: hidden layers, and attention weights in float32.
  def hidden(tower: model_config.ViTConfig | model_config.MedConfig) -> int:
    return size * (tower.mlp_dim + 4 * tower.width)

  encoding = tokens * (hidden(vit) + 4 * vit.num_heads * vit.num_tokens)
  matching = (
    TEXTS_AT_ONCE * length * (hidden(text) + 4 * text.num_heads * tokens)
  )
  # Twice: an operation's input and its output.
  return stored + 2 * max(encoding, matching)


def block_size(
  config: model_config.BlipConfig,
  mesh: jax.sharding.Mesh,
  length: int,
  num_frames: int = 1,
) -> int:
  """Images, on all devices together, that fit in `BLOCK_BYTES` per device."""
  per_device = BLOCK_BYTES // image_bytes(config, length, num_frames)
  return max(per_device, 1) * sharding.num_data_shards(mesh)
