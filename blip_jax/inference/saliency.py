"""Where a model looks: Grad-CAM of its attention to the image.

The map of a word is, for every patch of the image,

  mean over heads of max(0, A * dy/dA)

where A is the attention of the word's token to the patch in one layer, and y
is the ITM logit "match", or the log-probability of a generated token. As A is
positive, this is max(0, dy/dg) for a factor g of A that is 1; the model calls
such factors gates (`models.layers.GATES`), and their gradient is all that is
needed.

For a match, dy/dg is the mean over g from 0 to 1 of the whole layer (integrated
gradients, Sundararajan et al., 2017). Where a text matches, the logit is past
its steepest: still more attention to what the text names changes little, or
lowers it, so that the gradient at 1 alone, Grad-CAM, often misses the object.

The map of a whole text that matches is that of its first token, [ENC], which
the ITM head reads.

Dimensions: I images with one text each, L text length, T generated tokens, H
heads, N image tokens, h and w patches vertically and horizontally, D layers.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import spmd
from jaxtyping import Array, Float, Int, UInt8

from blip_jax.data import tokenizer as tokenizer_lib
from blip_jax.inference import scoring
from blip_jax.inference.explanation import Explanation
from blip_jax.models import blip, layers, med
from blip_jax.models import config as model_config
from blip_jax.runtime import sharding
from blip_jax.tasks import base

# Gates at which the gradient of a match is taken: of Grad-CAM; and enough for
# integrated gradients, as four give the same peaks on Scenes.
GRAD_CAM = np.ones(1, np.float32)
INTEGRATED = (np.arange(8, dtype=np.float32) + 0.5) / 8


class Where(NamedTuple):
  """Which attention maps are taken, as arrays: any choice runs in the same
  program.

  Attributes:
    layer: of the text tower, for words.
    whole: the layer for the whole text.
    heads: weight of each head, [H]; they sum to 1.
  """

  layer: Any
  whole: Any
  heads: Any


def where(
  config: model_config.MedConfig,
  layer: int | None = None,
  heads: Sequence[int] | None = None,
) -> Where:
  """Checks a choice of layer and heads.

  Args:
    config: of the text tower.
    layer: from 0 on. By default the middle one, the seventh of twelve, which
      LAVIS takes for ITM; but the last one for a whole text that matches. What
      its words attend to there does not reach the ITM head, so that their maps
      are zero.
    heads: whose maps are averaged; all by default.

  Raises:
    ValueError: there is no such layer or head; says which there are.
  """
  last = config.depth - 1
  middle = max(min(config.depth // 2, last - 1), 0)
  if layer is not None and layer not in range(config.depth):
    raise ValueError(f"layer: expected one of 0 to {last}, found {layer!r}")
  chosen = range(config.num_heads) if heads is None else list(heads)
  unknown = [head for head in chosen if head not in range(config.num_heads)]
  if unknown or not chosen:
    raise ValueError(
      f"heads: expected some of 0 to {config.num_heads - 1}, found {heads!r}"
    )
  weights = np.zeros(config.num_heads, np.float32)
  weights[[*chosen]] = 1 / len(set(chosen))
  layer, whole = (middle, last) if layer is None else (layer, layer)
  return Where(np.int32(layer), np.int32(whole), weights)


class Explainer:
  """The compiled programs of one model, for `inference.model.Model`."""

  def __init__(
    self,
    module: blip.Blip,
    params: med.Params,
    tokenizer: tokenizer_lib.Tokenizer,
    mesh: jax.sharding.Mesh,
  ):
    self._module, self._params, self._mesh = module, params, mesh
    self._tokenizer = tokenizer

  def match(
    self,
    pixels: UInt8[np.ndarray, "H W 3"],
    tokens: scoring.Texts,
    where: Where,
    gates: Float[np.ndarray, " S"] = INTEGRATED,
  ) -> Explanation:
    """Explains that a text matches an image.

    Args:
      pixels: in the model's image size.
      tokens: of the only text.
      where: whose maps are taken.
      gates: at which the gradient is taken.
    """
    batch = {"image": pixels[None], **tokens._asdict()}
    (maps,), (whole,) = self._run(_match_maps, batch, where, gates)
    # Without [ENC] and [SEP].
    span = slice(1, int(tokens.lengths[0]) - 1)
    ids = tokens.input_ids[0, span].tolist()
    words, word_maps = self._words(ids, maps[span])
    return Explanation(words, word_maps, whole, pixels)

  def captions(
    self,
    pixels: UInt8[np.ndarray, "I H W 3"],
    ids: Int[np.ndarray, "I L"],
    prompt_length: int,
    where: Where,
  ) -> list[Explanation]:
    """Explains every token of generated captions.

    Args:
      pixels: in the model's image size.
      ids: the prompt, which starts with [DEC], the caption of each image,
        [SEP] if there is one, and padding.
      prompt_length: tokens of the prompt, which is not explained.
      where: whose maps are taken.
    """
    batch = {
      "image": pixels,
      "input_ids": ids,
      "attention_mask": (ids != self._tokenizer.pad_id).astype(np.int32),
    }
    (maps,) = self._run(_caption_maps, batch, where)
    explanations = []
    for row, own_maps, image in zip(ids.tolist(), maps, pixels, strict=False):
      end = min(
        row.index(token) if token in row else len(row)
        for token in (self._tokenizer.sep_id, self._tokenizer.pad_id)
      )
      # The token at a position is predicted by the one before it.
      words, word_maps = self._words(
        row[prompt_length:end], own_maps[prompt_length - 1 : end - 1]
      )
      whole = word_maps.sum(axis=0) / max(len(words), 1)
      explanations.append(Explanation(words, word_maps, whole, image))
    return explanations

  def _run(
    self, program: Any, batch: dict[str, np.ndarray], *chosen: Any
  ) -> list[Float[np.ndarray, "I ..."]]:
    num_rows = len(batch["image"])
    size = sharding.padded_batch_size(num_rows, self._mesh)
    rows = np.minimum(np.arange(size), num_rows - 1)
    padded = {name: x[rows] for name, x in batch.items()}
    with sharding.activate(self._mesh):
      maps = program(
        self._module,
        self._params,
        sharding.put_batch(padded, self._mesh),
        *chosen,
      )
    return [sharding.local_rows(x)[:num_rows] for x in maps]

  def _words(
    self, ids: Sequence[int], maps: Float[np.ndarray, "T h w"]
  ) -> tuple[tuple[str, ...], Float[np.ndarray, "n h w"]]:
    """Joins pieces of words, and takes the mean of their maps."""
    words: list[str] = []
    word_maps: list[list[np.ndarray]] = []
    for piece, own in zip(self._tokenizer.pieces(ids), maps, strict=True):
      if piece.startswith("##") and words:
        words[-1] += piece.removeprefix("##")
        word_maps[-1].append(own)
      else:
        words.append(piece)
        word_maps.append([own])
    means = [np.mean(own, axis=0) for own in word_maps]
    shape = len(words), *self._module.config.vit.grid
    return tuple(words), np.array(means, np.float32).reshape(shape)


@functools.partial(jax.jit, static_argnums=0)
def _match_maps(
  module: blip.Blip,
  params: med.Params,
  batch: base.Batch,
  where: Where,
  gates: Float[Array, " S"],
) -> tuple[Float[Array, "I L h w"], Float[Array, "I h w"]]:
  """Maps of all tokens, special ones included, and of the whole text."""
  score = _score(module, params, batch, "image_kv", "text_encoder")
  ones = _gates(module, batch)

  def maps(layer: Int[Array, ""]) -> Float[Array, "I L h w"]:
    def logits(own: Float[Array, "I H L N"]) -> Float[Array, ""]:
      return score(ones.at[layer].set(own), "match")[:, 1].sum()

    def gradient(gate: Float[Array, ""]) -> Float[Array, "I H L N"]:
      return jax.grad(logits)(gate * ones[0])

    gradients = jax.lax.map(gradient, gates)
    return _maps(gradients.mean(axis=0), where.heads, module.config.vit.grid)

  # One after the other, by one program.
  words, whole = jax.lax.map(maps, jnp.stack([where.layer, where.whole]))
  return words, whole[:, 0]


@functools.partial(jax.jit, static_argnums=0)
def _caption_maps(
  module: blip.Blip, params: med.Params, batch: base.Batch, where: Where
) -> tuple[Float[Array, "I T h w"]]:
  """For every position but the last, its map for the token that follows."""
  score = _score(module, params, batch, "decoder_kv", "text_decoder")
  ones, ids = _gates(module, batch), batch["input_ids"]

  def log_probs(gates: Float[Array, "I H L N"]) -> Float[Array, "I T"]:
    predicted = score(ones.at[where.layer].set(gates), "decode")
    log_probs = jax.nn.log_softmax(predicted.logits()[:, :-1])
    return jnp.take_along_axis(log_probs, ids[:, 1:, None], axis=-1)[..., 0]

  found, backward = jax.vjp(log_probs, ones[0])

  def at(position: Int[Array, ""]) -> Float[Array, "I H N"]:
    of_token = jnp.zeros_like(found).at[:, position].set(1)
    return backward(of_token)[0][:, :, position]

  # One after the other: together they would need T times the memory.
  gradient = jax.lax.map(at, jnp.arange(found.shape[1]))
  gradient = gradient.transpose(1, 2, 0, 3)
  return (_maps(gradient, where.heads, module.config.vit.grid),)


def _score(
  module: blip.Blip,
  params: med.Params,
  batch: base.Batch,
  project: str,
  tower: str,
) -> Any:
  """A function (gates of all layers, method) -> the method's output.

  Args:
    project: the method that makes keys and values of image tokens.
    tower: the text tower that attends to them.
  """
  apply: Any = functools.partial(module.apply, {"params": params})
  states = apply(base.pixels(batch), method="encode_image")
  image_kv = apply(states, method=project)

  def score(gates: Float[Array, "D I H L N"], method: str) -> Any:
    gated = {tower: {"layers": {"crossattention": {"gate": gates}}}}
    variables = {"params": params, layers.GATES: gated}
    return module.apply(variables, *base.text(batch), image_kv, method=method)

  return score


def _gates(module: blip.Blip, batch: base.Batch) -> Float[Array, "D I H L N"]:
  text, num_tokens = module.config.med, module.config.vit.num_tokens
  num_texts, length = batch["input_ids"].shape
  shape = text.depth, num_texts, text.num_heads, length, num_tokens
  return jnp.ones(shape, jnp.float32)


def _maps(
  gradient: Float[Array, "I H L N"],
  heads: Float[Array, " H"],
  grid: tuple[int, int],
) -> Float[Array, "I L h w"]:
  # The first image token is [CLS], which has no place.
  positive = jax.nn.relu(gradient[..., 1:])
  maps = jnp.einsum("ihln,h->iln", positive, heads)
  maps = maps.reshape(*maps.shape[:2], *grid)
  return spmd.with_logical_constraint(maps, ("batch", None, None, None))
